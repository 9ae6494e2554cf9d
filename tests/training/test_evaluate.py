"""The loss of a split: exact, in constant memory, and the same from the command line as in a bundle's README."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model.bundle import save_bundle
from model.config import ModelConfig
from model.frozen.baked import bake
from model.frozen.served import score_document
from model.network.network import AllAttentionLM
from model.scoring import TextFigures
from model.tokenizer import BytesTokenizer, Tokenizer, train_bpe, train_words
from tests.support.agreement_bundle import TEXT, build_network, text_tokens, write_bundle
from training.evaluate import COLD_STREAMS, cold_start, evaluate, main, score_tokens

ROOT = Path(__file__).parents[2]
WORDS = "the cat sat on the mat\nthe dog sat on the cat\n" * 20


@pytest.fixture(scope="module")
def baked():
    return bake(build_network())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("shelf") / "bundle")


def write_corpus(folder: Path, **splits: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("train", "valid", "test"):
        text = splits.get(name, TEXT)
        (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def write_tiny_bundle(path: Path, tokenizer: Tokenizer, **fields: object) -> Path:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, num_layers=1, width=8, num_heads=2, num_persistent=2, max_span=8, span_ramp=2
    ).model_copy(update=fields)
    torch.manual_seed(5)
    tensors = {name: tensor.numpy() for name, tensor in AllAttentionLM(config).state_dict().items()}
    save_bundle(path, config=config, tokenizer=tokenizer, tensors=tensors, card="", training={})
    return path


def test_a_split_scores_as_all_its_log_probabilities_in_one_piece(baked):
    tokens = np.tile(text_tokens(330), 3)  # four chunks of 256, the last one shorter
    logprobs = [number for chunk, _ in score_document(baked, tokens) for number in chunk.tolist()]
    whole = TextFigures.of(BytesTokenizer(), tokens[1:].tolist(), logprobs)
    assert score_tokens(baked, BytesTokenizer(), tokens) == whole
    assert whole.num_tokens == 3 * 330 - 1


def test_streams_that_begin_cold_score_as_documents_of_their_own(baked):
    tokens = np.tile(text_tokens(330), 3)
    starts = np.linspace(0, len(tokens) - 40 - 1, COLD_STREAMS).astype(int)
    expected = 0.0
    for start in starts:
        expected += sum(chunk.sum() for chunk, _ in score_document(baked, tokens[start : start + 41]))
    score = cold_start(baked, BytesTokenizer(), tokens, lengths=(40, 10_000))
    assert list(score) == [40]
    assert score[40].num_tokens == 40 * COLD_STREAMS
    assert score[40].logprob == pytest.approx(expected, rel=1e-5)


def test_the_command_tells_the_figures_of_the_card(bundle, baked, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", test=TEXT * 2)
    assert main([str(bundle), "--path", str(corpus), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    tokens = np.frombuffer((TEXT * 2).encode(), np.uint8)
    score = evaluate(baked, BytesTokenizer(), tokens).score
    assert told["bits_per_byte"] == score.bits_per_byte
    assert told["perplexity"] == score.perplexity
    assert told["bits_per_char"] == score.bits_per_char
    assert told["word_perplexity"] == score.word_perplexity
    assert (told["num_tokens"], told["num_chars"]) == (len(tokens) - 1, len(TEXT * 2) - 1)
    assert (told["split"], told["bundle"]) == ("test", str(bundle))


def test_each_split_can_be_asked_for(bundle, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", train="a" * 20, valid="b" * 30, test="c" * 40)
    for split, length in (("train", 20), ("valid", 30), ("test", 40)):
        assert main([str(bundle), "--path", str(corpus), "--split", split, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["num_tokens"] == length - 1


def test_a_person_reads_four_figures_and_sees_the_rate_and_the_time_left(bundle, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus")
    assert main([str(bundle), "--path", str(corpus)]) == 0
    said = capsys.readouterr()
    for words in ("bits per character", "bits per byte", "perplexity per token", "perplexity per word", str(bundle)):
        assert words in said.out
    assert "tok/s" in said.err


@pytest.mark.parametrize("make", [lambda: train_words([WORDS]), lambda: train_bpe([WORDS], vocab_size=265)])
def test_the_tokenizer_of_the_bundle_reads_the_split(make, tmp_path, capsys):
    tokenizer = make()
    corpus = write_corpus(tmp_path / "corpus", test=WORDS)
    path = write_tiny_bundle(tmp_path / "bundle", tokenizer)
    assert main([str(path), "--path", str(corpus), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_tokens"] == len(tokenizer.encode(WORDS)) - 1


def test_a_lower_precision_is_computed_and_told(bundle, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus")
    told = {}
    for dtype in ("float32", "bfloat16"):
        assert main([str(bundle), "--path", str(corpus), "--dtype", dtype, "--json"]) == 0
        told[dtype] = json.loads(capsys.readouterr().out)
    assert told["bfloat16"]["dtype"] == "bfloat16"
    assert told["bfloat16"]["bits_per_byte"] != told["float32"]["bits_per_byte"]
    assert told["bfloat16"]["bits_per_byte"] == pytest.approx(told["float32"]["bits_per_byte"], rel=0.05)


def test_what_cannot_be_evaluated_is_one_clear_line(bundle, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", valid="x", test=b"\xff\xff\xff")
    bpe = write_tiny_bundle(tmp_path / "bpe", train_bpe([WORDS], vocab_size=260))
    cases = [
        (["nowhere", "--path", str(corpus)], "nowhere does not exist"),
        ([str(bundle)], "give data.name"),
        ([str(bundle), "--data", "enwik9"], "'enwik9' is unknown"),
        ([str(bundle), "--data", "shakespeare"], "shakespeare has no test split"),
        ([str(bundle), "--path", str(corpus), "--split", "valid"], "the valid split of corpus has 1 tokens"),
        ([str(bpe), "--path", str(corpus)], "byte 0 of the split is not UTF-8, and a bpe tokenizer"),
    ]
    if not torch.cuda.is_available():
        cases.append(([str(bundle), "--path", str(corpus), "--device", "cuda"], "torch sees no CUDA device"))
    for arguments, words in cases:
        assert main(arguments) == 1, arguments
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.splitlines()[-1].startswith("error: ")
        assert words in said.err.splitlines()[-1]


MEASURE = """
import resource, sys
import numpy as np, torch
from model.frozen.baked import load_baked
from training.evaluate import score_tokens
from model.bundle import open_bundle
bundle = open_bundle(sys.argv[1])
model = load_baked(bundle)
for length in (20_000, int(sys.argv[2])):
    score_tokens(model, bundle.tokenizer, np.resize(np.arange(256, dtype=np.uint8), length))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_split(tmp_path):
    path = write_tiny_bundle(tmp_path / "bundle", BytesTokenizer())
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), "200000"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    short, long = map(int, ended.stdout.split())  # KiB
    assert long - short < 2 * 1024, f"20,000 tokens take {short} KiB and 200,000 {long}"
