"""Tokenizers: exact round trips, files, training, corpora in pieces and streams of ids, for all three kinds."""

import json
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from model.tokenizer import (
    BPE_EOS,
    BpeTokenizer,
    BytesTokenizer,
    StreamingDecoder,
    Tokenizer,
    TokenizerError,
    WordTokenizer,
    encode_corpus,
    load_tokenizer,
    split_text,
    train_bpe,
    train_words,
)

ROOT = Path(__file__).parents[2]
SHAKESPEARE = (ROOT / "training" / "corpora" / "shakespeare.txt").read_text(encoding="utf-8")
SAMPLE = SHAKESPEARE[:100_000]
# A line of WikiText, and all kinds of whitespace that str.split splits at.
WIKITEXT = " = Robert <unk> = \n \n Robert <unk> is an English film . \n"
SPACES = [chr(code) for code in range(0x3001) if chr(code).isspace()]
# Texts in which the rules of GPT-2's word pattern are likely to interact.
tricky_texts = st.text(alphabet=st.sampled_from([*" \n\t'ast19.,é€😀\x00\u0301\u200b", *SPACES]), max_size=40)


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return train_bpe([SAMPLE], vocab_size=400, eos=True)


@pytest.fixture(scope="module")
def words() -> WordTokenizer:
    return train_words([SAMPLE])


@pytest.fixture(scope="module", params=["bytes", "bpe", "word"])
def tokenizer(request: pytest.FixtureRequest, bpe: BpeTokenizer, words: WordTokenizer) -> Tokenizer:
    by_kind: dict[str, Tokenizer] = {"bytes": BytesTokenizer(), "bpe": bpe, "word": words}
    return by_kind[request.param]


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def exact(request: pytest.FixtureRequest, bpe: BpeTokenizer) -> Tokenizer:
    """The kinds of tokenizers that round-trip every text."""
    return bpe if request.param == "bpe" else BytesTokenizer()


def joined(parts: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


# Round trips


@given(text=st.text() | tricky_texts)
@settings(deadline=None)
def test_bytes_and_bpe_give_every_text_back(exact: Tokenizer, text: str) -> None:
    ids = exact.encode(text)

    assert exact.decode(ids) == text
    assert b"".join(map(exact.token_bytes, ids)) == text.encode()
    assert all(0 <= id < exact.vocab_size for id in ids)


@given(text=st.text() | tricky_texts)
@settings(deadline=None)
def test_words_split_where_python_splits_and_at_each_line_end(words: WordTokenizer, text: str) -> None:
    lines = [line.split() for line in text.split("\n")]
    known = {words.token_text(id) for id in range(words.vocab_size)}
    seen = [[word + " " if word + " " in known else "<unk> " for word in line] for line in lines]

    assert words.decode(words.encode(text)) == "\n".join("".join(line) for line in seen)


@given(data=st.data())
@settings(deadline=None)
def test_word_ids_survive_their_own_text(words: WordTokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, words.vocab_size - 1)))

    assert words.encode(words.decode(ids)) == ids


def test_the_ids_of_the_bytes_kind_are_the_byte_values() -> None:
    assert BytesTokenizer().encode("é\n") == [0xC3, 0xA9, 0x0A]
    assert (BytesTokenizer().vocab_size, BytesTokenizer().eos_id) == (256, None)


def test_wikitext_lines_become_words_and_line_ends() -> None:
    tokenizer = train_words([WIKITEXT])
    spelled = [tokenizer.token_bytes(id).decode() for id in tokenizer.encode(WIKITEXT)]

    assert spelled[:6] == ["= ", "Robert ", "<unk> ", "= ", "\n", "\n"]
    assert len(spelled) == len(WIKITEXT.split()) + WIKITEXT.count("\n")
    assert tokenizer.token_bytes(tokenizer.eos_id) == b"\n"
    assert tokenizer.eos_id not in tokenizer.encode("typed <eos> stays a word")


def test_an_unknown_word_becomes_unk() -> None:
    tokenizer = train_words(["known words\n"])

    assert tokenizer.decode(tokenizer.encode("unheard words\n")) == "<unk> words \n"


@given(before=tricky_texts, after=tricky_texts)
@settings(deadline=None)
def test_an_end_token_that_is_typed_is_text(bpe: BpeTokenizer, before: str, after: str) -> None:
    ids = bpe.encode(before + BPE_EOS + after)

    assert bpe.eos_id not in ids
    assert bpe.decode(ids) == before + BPE_EOS + after


def test_the_end_id_is_the_last_and_stands_for_no_bytes(bpe: BpeTokenizer) -> None:
    assert bpe.eos_id == bpe.vocab_size - 1
    assert bpe.token_bytes(bpe.eos_id) == b""
    assert train_bpe([SAMPLE], vocab_size=300).eos_id is None


def test_token_text_shows_a_part_of_a_character_as_a_replacement(exact: Tokenizer) -> None:
    tokens = {exact.token_bytes(id): exact.token_text(id) for id in range(exact.vocab_size)}

    assert tokens[b"a"] == "a"
    assert tokens[b"\xe2"] == "\ufffd"


# Rejected ids and texts


@pytest.mark.parametrize("offset", [0, 7])
def test_an_id_beyond_the_vocabulary_is_refused_by_name(tokenizer: Tokenizer, offset: int) -> None:
    id = tokenizer.vocab_size + offset

    with pytest.raises(TokenizerError, match=rf"token id {id} .* ids 0 to {tokenizer.vocab_size - 1}"):
        tokenizer.decode([0, id])


def test_a_negative_id_does_not_count_from_the_end(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="token id -1 is out of range"):
        tokenizer.token_bytes(-1)
    with pytest.raises(TokenizerError, match="token id -1 is out of range"):
        StreamingDecoder(tokenizer).add(-1)


def test_a_lone_surrogate_is_refused_with_its_place(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"lone surrogate U\+D83D at character 2"):
        tokenizer.encode("ab\ud83d")


# Files


def test_a_saved_tokenizer_loads_equal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")

    assert (loaded.kind, loaded.vocab_size, loaded.eos_id) == (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id)
    assert [loaded.token_bytes(id) for id in range(loaded.vocab_size)] == [
        tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)
    ]
    assert loaded.encode(SAMPLE) == tokenizer.encode(SAMPLE)


def test_loading_and_saving_again_writes_the_same_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "first.json")
    load_tokenizer(tmp_path / "first.json").save(tmp_path / "second.json")

    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()


def test_the_tokenizers_library_reads_the_same_ids_from_the_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    library = Library.from_file(str(tmp_path / "tokenizer.json"))

    assert library.encode("naïve  words\n\n <eos> 😀 ").ids == tokenizer.encode("naïve  words\n\n <eos> 😀 ")


def test_bpe_of_256_tokens_stays_bpe_in_its_file(tmp_path: Path) -> None:
    train_bpe([SAMPLE], vocab_size=256).save(tmp_path / "tokenizer.json")

    assert load_tokenizer(tmp_path / "tokenizer.json").kind == "bpe"


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b'{"model": {"type": "BPE"', b"\xff\xfe"])
def test_a_broken_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)

    with pytest.raises(TokenizerError, match=r"broken\.json is not a readable tokenizer file .*copy it again"):
        load_tokenizer(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"nowhere\.json is not a readable"):
        load_tokenizer(tmp_path / "nowhere.json")


def test_a_tokenizer_with_other_rules_is_refused_by_what_differs(bpe: BpeTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    rules = json.loads(path.read_text(encoding="utf-8"))
    rules["pre_tokenizer"]["add_prefix_space"] = True
    rules["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(rules), encoding="utf-8")

    with pytest.raises(TokenizerError, match=r"tokenizer\.json: normalizer, pre_tokenizer are not as a bpe tokenizer"):
        load_tokenizer(path)


def test_added_special_tokens_are_refused(bpe: BpeTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "tokenizer.json")
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    library.add_special_tokens([BPE_EOS])
    library.save(str(tmp_path / "tokenizer.json"))

    with pytest.raises(TokenizerError, match="added_tokens are not as a bpe tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.Unigram([("a", 0.0)], 0, False), "model type 'Unigram' is not supported"),
        (models.BPE({"a": 0}, []), "needs all 256 bytes; it lacks 255"),
        (models.WordLevel({"a": 0, "<unk>": 1}, "<unk>"), r"needs the entry '\\n'"),
        (models.WordLevel({"\n": 0, "<unk>": 2}, "<unk>"), "must have the ids 0 to 1, each once"),
        (
            models.BPE(
                {letter: i for i, letter in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "中"])}, []
            ),
            "'中' is not written in the byte alphabet",
        ),
    ],
)
def test_a_vocabulary_that_breaks_a_promise_is_refused(model: models.Model, message: str, tmp_path: Path) -> None:
    Library(model).save(str(tmp_path / "tokenizer.json"))

    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path / "tokenizer.json")


# Training


def test_bpe_training_is_the_same_every_time_and_in_any_pieces(tmp_path: Path) -> None:
    train_bpe([SAMPLE], vocab_size=500).save(tmp_path / "whole.json")
    train_bpe(split_text(SAMPLE, size=999), vocab_size=500).save(tmp_path / "pieces.json")

    assert (tmp_path / "whole.json").read_bytes() == (tmp_path / "pieces.json").read_bytes()


@pytest.mark.parametrize("eos", [False, True])
def test_bpe_has_exactly_the_size_asked_for(eos: bool) -> None:
    assert train_bpe([SAMPLE], vocab_size=300, eos=eos).vocab_size == 300


@pytest.mark.parametrize(("vocab_size", "eos", "least"), [(255, False, 256), (256, True, 257)])
def test_bpe_too_small_for_all_bytes_is_refused(vocab_size: int, eos: bool, least: int) -> None:
    with pytest.raises(TokenizerError, match=f"vocab_size {vocab_size} must be at least {least}"):
        train_bpe([SAMPLE], vocab_size=vocab_size, eos=eos)


def test_bpe_larger_than_the_text_supports_is_refused_with_the_largest() -> None:
    with pytest.raises(TokenizerError, match="vocab_size 1000 is too large: the texts give 260 tokens at most"):
        train_bpe(["abcd abcd"], vocab_size=1000)

    assert train_bpe(["abcd abcd"], vocab_size=260).vocab_size == 260


def test_word_ids_fall_with_the_count(words: WordTokenizer) -> None:
    counts = Counter(words.encode(SAMPLE))

    assert [counts[id] for id in range(words.vocab_size)] == [*sorted(counts.values(), reverse=True), 0]
    assert words.token_bytes(words.vocab_size - 1) == b"<unk> ", "it never occurs in this text"


def test_words_that_are_cut_count_as_unknown() -> None:
    tokenizer = train_words(["a a a b b c d e f\n"], vocab_size=4)

    assert [tokenizer.token_text(id) for id in range(4)] == ["<unk> ", "a ", "b ", "\n"]


@pytest.mark.parametrize("vocab_size", [1, 5])
def test_a_word_vocabulary_of_an_impossible_size_is_refused(vocab_size: int) -> None:
    with pytest.raises(TokenizerError, match=f"vocab_size {vocab_size} must be between 2 and 4"):
        train_words(["one two\n"], vocab_size=vocab_size)


# Corpora


@pytest.mark.parametrize(("text", "size"), [(SHAKESPEARE, 200), (SAMPLE, 1)], ids=["all", "at every place allowed"])
def test_cutting_shakespeare_changes_no_id(tokenizer: Tokenizer, text: str, size: int) -> None:
    pieces = list(split_text(text, size=size))

    assert len(pieces) > 5000
    assert "".join(pieces) == text
    assert joined(tokenizer.encode_batch(pieces)) == tokenizer.encode(text)


@given(text=tricky_texts, size=st.integers(1, 5))
@settings(deadline=None)
def test_cutting_any_text_changes_no_id(tokenizer: Tokenizer, text: str, size: int) -> None:
    pieces = list(split_text(text, size=size))

    assert "".join(pieces) == text
    assert joined(tokenizer.encode_batch(pieces)) == tokenizer.encode(text)


def test_cutting_beside_any_odd_space_or_invisible_character_changes_no_id(tokenizer: Tokenizer) -> None:
    odd = [chr(code) for code in range(0x11000) if unicodedata.category(chr(code)) in ("Zs", "Zl", "Zp", "Cc", "Cf")]
    text = "".join(f"x{c}  b{c}\n{c}\n y" for c in odd)

    assert joined(tokenizer.encode_batch(list(split_text(text, size=1)))) == tokenizer.encode(text)


def test_a_corpus_encodes_as_one_text_and_reports_every_character(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.tokenizer._PIECES_PER_BATCH", 2)
    text = SHAKESPEARE[:300_000]
    done: list[int] = []
    ids = encode_corpus(tokenizer, text, progress=done.append)

    assert ids.dtype == np.uint16
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert len(done) == 3
    assert sum(done) == len(text)
    assert encode_corpus(tokenizer, "").shape == (0,)


def test_ids_beyond_uint16_are_int32() -> None:
    text = " ".join(f"w{i}" for i in range(70_000)) + "\n"
    tokenizer = train_words([text])
    ids = encode_corpus(tokenizer, text)

    assert ids.dtype == np.int32
    assert sorted(ids) == list(range(70_001))


# Streams


@given(data=st.data())
@settings(deadline=None)
def test_a_stream_of_any_ids_joins_to_the_plain_decoding(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    decoder = StreamingDecoder(tokenizer)
    pieces = [decoder.add(id) for id in ids]

    assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids)


@given(content=st.lists(st.text(max_size=3).map(str.encode) | st.binary(max_size=4)).map(b"".join))
def test_a_stream_of_broken_utf8_joins_to_the_plain_decoding(content: bytes) -> None:
    decoder = StreamingDecoder(BytesTokenizer())
    pieces = [decoder.add(byte) for byte in content]

    assert "".join(pieces) + decoder.finish() == content.decode(errors="replace")


@given(text=st.text())
def test_a_stream_never_splits_a_character_and_never_waits_for_the_next(text: str) -> None:
    decoder = StreamingDecoder(BytesTokenizer())

    for character in text:
        *parts, last = [decoder.add(byte) for byte in character.encode()]
        assert parts == [""] * len(parts)
        assert last == character
    assert decoder.finish() == ""


def test_a_finished_stream_can_start_again() -> None:
    decoder = StreamingDecoder(BytesTokenizer())

    assert decoder.add(0xE2) + decoder.finish() == "\ufffd"
    assert decoder.add(ord("a")) == "a"


def test_reading_text_loads_no_torch() -> None:
    check = "import sys, model.tokenizer, model.bundle; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0
