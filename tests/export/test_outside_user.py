"""Tests of an artefact without this project's code: only onnxruntime, numpy and the manifest.

The test keeps ring buffers as the manifest's `ring_layout` says. The graphs must give the oracle's logits for a text
longer than the longest ring, with batch sizes and lengths that the export never used.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests import oracle
from tests.support.agreement_bundle import KINDS, build_network, text_tokens
from tests.support.artefacts import artefact_of

pytestmark = pytest.mark.slow

LENGTH = 230  # longer than the longest ring, 160 slots
TOLERANCE = 1e-4
NUMPY = {"float32": np.float32, "float16": np.float16, "int64": np.int64}


class Stranger:
    """A user of an artefact, who runs the graphs by the names in the manifest."""

    def __init__(self, folder: Path, *, num_rows: int, junk: float = 0.0) -> None:
        """junk: the value of slots that nothing was written to."""
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.sessions = {
            name: onnxruntime.InferenceSession(folder / graph["file"], providers=["CPUExecutionProvider"])
            for name, graph in self.manifest["graphs"].items()
        }
        self.lengths = np.zeros(num_rows, np.int64)
        self.rings = {}
        for facts in self.manifest["graphs"]["decode"]["inputs"]:
            if facts["name"].startswith("layer"):
                self.rings[facts["name"]] = np.full([num_rows, *facts["shape"][1:]], junk, NUMPY[facts["dtype"]])

    def run(self, name: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        facts = self.manifest["graphs"][name]
        fed = {part["name"]: inputs[part["name"]].astype(NUMPY[part["dtype"]]) for part in facts["inputs"]}
        outputs = [part["name"] for part in facts["outputs"]]
        found = dict(zip(outputs, self.sessions[name].run(outputs, fed), strict=True))
        for part in facts["outputs"]:
            assert found[part["name"]].dtype == NUMPY[part["dtype"]], part["name"]
            assert found[part["name"]].ndim == len(part["shape"]), part["name"]
        return found

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Read one token [R] in every row; return the logits [R, V]."""
        found = self.run("decode", tokens=tokens, lengths=self.lengths, **self.rings)
        for row in range(len(tokens)):
            self.write(found, place=row, row=row, count=1)
        return found["logits"]

    def extend(self, tokens: np.ndarray, rows: list[int], num_new: list[int]) -> dict[str, np.ndarray]:
        """Read tokens [B, T] in some rows, num_new[b] real tokens and then padding; return all outputs."""
        rings = {name: ring[rows] for name, ring in self.rings.items()}
        found = self.run("extend", tokens=tokens, num_new=np.array(num_new), lengths=self.lengths[rows], **rings)
        for place, (row, count) in enumerate(zip(rows, num_new, strict=True)):
            self.write(found, place=place, row=row, count=count)
        return found

    def write(self, found: dict[str, np.ndarray], *, place: int, row: int, count: int) -> None:
        for layer, groups in enumerate(self.manifest["rings"]):
            first = 0
            for index, group in enumerate(groups):
                heads = slice(first, first + group["num_heads"])
                first += group["num_heads"]
                for half, kind in enumerate(("key", "value")):
                    ring = self.rings[f"layer{layer}.group{index}.{kind}"]
                    for i in range(count):
                        slot = (self.lengths[row] + i) % group["num_slots"]
                        ring[row, :, slot] = found[f"layer{layer}.new"][place, i, half, heads]
        self.lengths[row] += count


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind) -> Path:
    return artefact_of(kind, "onnx")


@pytest.fixture(scope="module")
def text(kind) -> np.ndarray:
    return text_tokens(LENGTH, kind)


@pytest.fixture(scope="module")
def wanted(kind, text) -> np.ndarray:
    """Return the oracle's logits, [T, V]."""
    network = build_network(kind)
    config = network.config
    return oracle.logits(
        {name: tensor.double().numpy() for name, tensor in network.state_dict().items()},
        text.tolist(),
        num_heads=config.num_heads,
        max_span=config.max_span,
        span_ramp=config.span_ramp,
        empty_slots=config.empty_slots,
    )


def check(found: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(found - wanted).max() <= TOLERANCE


def test_token_by_token(folder, text, wanted):
    user = Stranger(folder, num_rows=1)
    check(np.concatenate([user.decode(text[i : i + 1]) for i in range(LENGTH)]), wanted)


def test_rows_that_began_at_different_times_decode_together(folder, text, wanted):
    user = Stranger(folder, num_rows=5)
    user.extend(np.stack([text[:161]] * 5), rows=[0, 1, 2, 3, 4], num_new=[1, 1, 24, 80, 161])
    user.lengths[0] = 0
    for ring in user.rings.values():
        ring[0] = 0  # a new stream in the first row
    while user.lengths.max() < LENGTH:
        at = user.lengths.copy()
        check(user.decode(text[at]), wanted[at])


@pytest.mark.parametrize("sizes", [[1, 37, 3, 189], [LENGTH], [160, 1, 69], [2] * 115], ids=("ragged", "one", "1", "2"))
def test_in_stretches(folder, text, wanted, sizes):
    user = Stranger(folder, num_rows=1)
    for size in sizes:
        start = int(user.lengths[0])
        found = user.extend(text[None, start : start + size], rows=[0], num_new=[size])
        check(found["logits"], wanted[start + size - 1 : start + size])
        check(user.run("logits", hidden=found["hidden"][0])["logits"], wanted[start : start + size])
        assert found["memory_share"].shape == (1, size, 3)
        assert (found["memory_share"] > 0).all()
        assert (found["memory_share"] <= 1 + 1e-6).all()  # 1 at the first token, where memory is all there is


def test_logits_are_those_after_the_last_real_token_whatever_the_padding(folder, text, wanted):
    """Rows have different lengths, in any order; the padding differs from call to call and changes nothing."""
    user = Stranger(folder, num_rows=4)
    random = np.random.default_rng(2)
    while user.lengths.min() < LENGTH:
        rows = [row for row in random.permutation(4).tolist() if user.lengths[row] < LENGTH][: random.integers(1, 5)]
        num_new = [int(min(random.integers(1, 60), LENGTH - user.lengths[row])) for row in rows]
        tokens = random.integers(len(wanted[0]), size=(len(rows), max(num_new) + int(random.integers(4))))
        for line, row, count in zip(tokens, rows, num_new, strict=True):
            line[:count] = text[user.lengths[row] : user.lengths[row] + count]
        found = user.extend(tokens, rows, num_new)
        check(found["logits"], wanted[user.lengths[rows] - 1])


def test_both_graphs_on_the_same_rings(folder, text, wanted):
    user = Stranger(folder, num_rows=3)
    while (start := int(user.lengths[0])) < LENGTH - 25:
        size = 5 + start % 20
        user.extend(np.stack([text[start : start + size]] * 3), rows=[2, 0, 1], num_new=[size] * 3)
        logits = user.decode(text[[start + size] * 3])
        check(logits, wanted[[start + size] * 3])


def test_slots_that_nothing_was_written_to_need_only_be_finite(kind, folder, text, wanted):
    """If empty slots are masked, they may hold any finite values; if the paper's zeros count, they must hold zeros."""
    if kind == "zero":
        user = Stranger(folder, num_rows=1, junk=3.0)
        assert np.abs(user.decode(text[:1]) - wanted[0]).max() > TOLERANCE
        return
    user = Stranger(folder, num_rows=1, junk=1e4)
    check(user.decode(text[:1]), wanted[:1])
    check(user.extend(text[None, 1:9], rows=[0], num_new=[8])["logits"], wanted[8:9])
