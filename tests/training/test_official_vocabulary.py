"""The vocabulary of a checkpoint of the paper's code, rebuilt from its train.txt."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.tokenizer import WordTokenizer
from tests.support.official_checkpoint import adaptive_state, imported, plain_state, refusal, saved
from training.official_vocabulary import EOS, count_tokens


@pytest.mark.parametrize(
    ("text", "flags", "told"),
    [
        ("a b c", (), "gives 4 symbols and the checkpoint has 5"),
        ("", (), "is empty"),
        ("a 1000 - _ ", ("--symbols", "bytes"), "token 'a' is not a decimal number from 0 to 255"),
        ("1 2 3 256", ("--symbols", "bytes"), "token '256' is not"),
        ("1 2 3 007", ("--symbols", "bytes"), "token '007' is not"),
        ("a b c \u00e9", ("--symbols", "letters"), "token '\u00e9' is not a single ASCII character"),
        ("a b c dd", ("--symbols", "letters"), "token 'dd' is not"),
        ("aa b c d", (), "read as words: a word vocabulary needs the entry '<unk>'"),
    ],
)
def test_a_text_that_is_not_the_checkpoints_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, flags: tuple[str, ...], told: str
) -> None:
    path, train = saved(tmp_path, plain_state(5)), tmp_path / "train.txt"
    train.write_text(text, encoding="utf-8")
    assert told in refusal(capsys, path, tmp_path / "bundle", "--vocab", train, *flags)
    assert not (tmp_path / "bundle").exists()


def test_a_text_that_cannot_be_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, train, out = saved(tmp_path, plain_state(5)), tmp_path / "train.txt", tmp_path / "bundle"
    assert "No such file" in refusal(capsys, path, out, "--vocab", train)
    train.write_bytes(b"a b \xff")
    assert "is not UTF-8" in refusal(capsys, path, out, "--vocab", train)


def test_byte_ids_need_256_symbols(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, saved(tmp_path, plain_state(205)), tmp_path / "bundle", "--vocab", "bytes")
    assert "--vocab bytes gives 256 symbols and the checkpoint has 205" in told


def test_byte_ids_have_no_tokens_of_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, plain_state(256))
    assert "give the train.txt" in refusal(capsys, path, tmp_path / "bundle", "--vocab", "bytes", "--symbols", "words")


def test_adaptive_embeddings_are_for_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, train = saved(tmp_path, adaptive_state([3, 2, 2])), tmp_path / "train.txt"
    train.write_text("1 2 3 4 5 6")
    assert "adaptive embeddings are for words" in refusal(capsys, path, tmp_path / "bundle", "--vocab", train)


@given(text=st.text("ab_ \t\n\r\x0b\u2028", max_size=40), piece_chars=st.integers(1, 9))
@settings(deadline=None)
def test_tokens_are_counted_line_by_line_whatever_the_piece(
    tmp_path_factory: pytest.TempPathFactory, text: str, piece_chars: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text(text, encoding="utf-8", newline="")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    seen = [token for line in lines for token in [*line.split(), EOS]]
    counts = count_tokens(path, piece_chars=piece_chars)
    assert list(counts) == list(dict.fromkeys(seen))
    assert all(counts[token] == seen.count(token) for token in seen)


def test_words_of_wikitext_keep_their_spelling(tmp_path: Path) -> None:
    text = " = Robert <unk> = \n \n @-@ caf\u00e9 1 @,@ 000\n"
    bundle = imported(tmp_path, saved(tmp_path, plain_state(9)), text)
    assert isinstance(bundle.tokenizer, WordTokenizer)
    assert bundle.tokenizer.decode(range(9)) == "= Robert <unk> \n@-@ caf\u00e9 1 @,@ 000 "


def test_single_letters_can_be_words(tmp_path: Path) -> None:
    bundle = imported(tmp_path, saved(tmp_path, plain_state(4)), "a b <unk>", "--symbols", "words")
    assert bundle.tokenizer.kind == "word"
