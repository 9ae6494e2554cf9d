"""Tests of verification by replay: an artefact with subtly wrong maths is refused, and none of its files remain.

Each fault is put into the model that is exported, or into the outputs of a right graph. The reference of the replay is
read from the bundle and stays right.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from export.graph import Steps
from export.run import export
from export.verify import BOUNDS, Verified, main, read_text, verify
from model.artefact import ArtefactError, open_artefact
from model.backends import LoadOptions
from model.bundle import open_bundle
from model.frozen.baked import BakedLM, load_baked
from model.frozen.exported import ExportedLM, load_exported
from model.frozen.torch_graphs import TorchGraphs, load_script
from tests.support.artefacts import artefact_of, bundle_of, model_of, text_file
from training.evaluate import evaluate


def positions_shifted(model: BakedLM) -> None:
    for table in model.tables.values():
        table.position.copy_(table.position.roll(1, -1))


def positions_of_one_ring_shifted(model: BakedLM) -> None:
    table = model.tables["160"]
    table.position.copy_(table.position.roll(1, -1))


def ramp_off_by_one(model: BakedLM) -> None:
    for table in model.tables.values():
        table.log_mass.copy_(table.log_mass.roll(1, -1))


def ramp_of_one_head_off_by_one(model: BakedLM) -> None:
    table = model.tables["24"]
    table.log_mass[1].copy_(table.log_mass[1].roll(1, -1))


def without_sqrt_n(model: BakedLM) -> None:
    for layer in model.layers:
        layer.persistent_value.div_(math.sqrt(model.config.num_persistent))


def without_sqrt_d(model: BakedLM) -> None:
    model.layers[-1].persistent_key.div_(math.sqrt(model.config.head_size))


def queries_not_scaled(model: BakedLM) -> None:
    model.layers[0].qkv[:, : model.config.width].mul_(math.sqrt(model.config.head_size))


def groups_in_another_order(model: BakedLM) -> None:
    layer = model.layers[0]
    layer.persistent_key.copy_(layer.persistent_key.flip(0))
    layer.persistent_value.copy_(layer.persistent_value.flip(0))


def two_heads_of_one_layer_swapped(model: BakedLM) -> None:
    layer, head = model.layers[1], model.config.head_size
    layer.out.copy_(torch.cat((layer.out[head : 2 * head], layer.out[:head], layer.out[2 * head :])))


def empty_slots_of_the_other_kind(model: BakedLM) -> None:
    model.config = model.config.model_copy(update={"empty_slots": "zero"})


def one_logit_off(model: BakedLM) -> None:
    model.output_bias[7] += 1e-3


FAULTS = (
    positions_shifted,
    positions_of_one_ring_shifted,
    ramp_off_by_one,
    ramp_of_one_head_off_by_one,
    without_sqrt_n,
    without_sqrt_d,
    queries_not_scaled,
    groups_in_another_order,
    two_heads_of_one_layer_swapped,
    empty_slots_of_the_other_kind,
    one_logit_off,
)


@pytest.fixture
def export_with(tmp_path, monkeypatch) -> Callable[[Callable[[BakedLM], None]], Path]:
    """Return a function that puts a fault into the small bundle's model, exports it, and returns the folder."""

    def run(fault: Callable[[BakedLM], None], *, format: str = "torchscript") -> Path:
        def load(bundle, *, dtype, device):
            model = load_baked(bundle, dtype=dtype, device=device)
            fault(model)
            return model

        out = tmp_path / "out"
        monkeypatch.setattr("export.run.load_baked", load)
        export(bundle_of(), out, format=format, text=text_file())
        return out

    return run


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_wrong_maths_is_not_let_pass_and_nothing_is_left(export_with, tmp_path, fault):
    with pytest.raises(ArtefactError, match=r"the artefact's logits differ from the bundle's by \d\.\d\de[+-]\d\d; at"):
        export_with(fault)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_wrong_maths_in_onnx_is_not_let_pass(export_with, tmp_path):
    with pytest.raises(ArtefactError, match=r"the artefact's logits differ from the bundle's by .* in float32"):
        export_with(positions_shifted, format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_without_a_fault_the_same_road_leads_to_an_artefact(export_with, tmp_path):
    open_artefact(export_with(lambda model: None))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["output_bias", "embedding"])
def test_what_is_no_number_is_not_let_pass(export_with, tmp_path, what, value):
    def fault(model):
        getattr(model, what)[ord("e")] = value  # this letter is in the text

    with pytest.raises(ArtefactError, match=r"the artefact's logits differ from the bundle's by (nan|inf); at most"):
        export_with(fault)
    assert list(tmp_path.iterdir()) == []


def test_an_artefact_that_was_there_stays_as_it_was_after_a_failure(export_with, tmp_path):
    out = export_with(lambda model: None)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ArtefactError):
        export_with(without_sqrt_n)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("step", ["decode", "extend"])
def test_a_fault_in_one_of_the_two_steps_is_found(export_with, monkeypatch, step):
    right = getattr(Steps, step)
    lengths = {"decode": 1, "extend": 2}[step]  # index of `lengths` among the inputs

    def wrong(steps, *inputs):
        return right(steps, *inputs[:lengths], inputs[lengths] + 1, *inputs[lengths + 1 :])

    monkeypatch.setattr(Steps, step, wrong)
    with pytest.raises(ArtefactError, match="the artefact's logits differ"):
        export_with(lambda model: None)


class Tampered(TorchGraphs):
    """Right graphs whose outputs are changed."""

    def __init__(self, graphs: TorchGraphs, change: Callable[[str, list[Tensor]], None]) -> None:
        self.device, self._graphs, self._change = graphs.device, graphs, change

    def run_decode(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        outputs = list(self._graphs.run_decode(inputs))
        self._change("decode", outputs)
        return outputs

    def run_extend(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        outputs = list(self._graphs.run_extend(inputs))
        self._change("extend", outputs)
        return outputs

    def run_logits(self, hidden: Tensor) -> Tensor:
        return self._graphs.run_logits(hidden)


def tampered(change: Callable[[str, list[Tensor]], None]) -> ExportedLM:
    artefact = open_artefact(artefact_of("masked", "torchscript"))
    graphs = Tampered(load_script(artefact, LoadOptions(device="cpu")), change)
    return ExportedLM(artefact.bundle.config, artefact.manifest, graphs)


def check(exported: ExportedLM, weights: str = "float32") -> Verified:
    return verify(open_bundle(bundle_of()), exported, weights=weights, text=text_file())


def test_a_right_artefact_passes_and_says_what_was_measured():
    found = check(tampered(lambda graph, outputs: None))
    assert found.num_steps == 60
    assert found.num_tokens > 1000
    assert 0 < found.logits_difference <= 1e-4
    assert 0 < found.state_difference <= 1e-4
    assert 0 < found.memory_share_difference <= 1e-4
    assert f"logits differ by at most {found.logits_difference:.1e}" in str(found)
    assert f"{found.bits_per_byte:.5f} bits per byte, the bundle {found.bits_per_byte_of_bundle:.5f}" in str(found)


def test_a_memory_share_that_is_off_is_not_let_pass():
    def change(graph, outputs):
        if graph == "extend":
            outputs[2] = outputs[2] + 1e-3

    with pytest.raises(ArtefactError, match=r"its memory share by 1\.00e-03; at most 0\.0001 is allowed"):
        check(tampered(change))


@pytest.mark.parametrize("step", ["decode", "extend"])
def test_new_keys_and_values_that_are_off_are_not_let_pass(step):
    def change(graph, outputs):
        if graph == step:
            outputs[-1][:, :, 0, 0, 0] += 1.5e-4  # one number of a key, which moves the logits by less

    with pytest.raises(ArtefactError, match=r"the artefact's keys and values differ from the bundle's by 1\.5\de-04"):
        check(tampered(change))


@pytest.mark.parametrize("weights", BOUNDS)
def test_the_bound_goes_with_how_weights_are_kept(weights):
    bound = BOUNDS[weights]

    def change(graph, outputs):
        if graph == "decode":
            outputs[0] = outputs[0] + 1.01 * bound

    with pytest.raises(ArtefactError, match=rf"at most {bound:g} is allowed with weights in {weights}"):
        check(tampered(change), weights)


def test_logits_that_are_nan_once_are_not_let_pass():
    calls = []

    def change(graph, outputs):
        calls.append(graph)
        if graph == "decode" and calls.count("decode") == 20:
            outputs[0][0, 5] = math.nan

    with pytest.raises(ArtefactError, match="the artefact's logits differ"):
        check(tampered(change))


def test_the_manifest_holds_what_was_measured():
    folder = artefact_of("masked", "torchscript")
    said = json.loads((folder / "manifest.json").read_text())["verified"]
    assert said["text"] == "masked.txt"
    assert Verified(**{name: value for name, value in said.items() if name != "text"}) == check(
        load_exported(open_artefact(folder), LoadOptions(device="cpu"))
    )
    bundle = open_bundle(bundle_of())
    tokens = np.array(bundle.tokenizer.encode(text_file().read_text()))
    expected = evaluate(load_baked(bundle), bundle.tokenizer, tokens).score
    assert said["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
    assert said["text_bytes"] == expected.num_bytes == len(text_file().read_bytes()) - 1  # the first is not scored


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked", "zero", "words"])
def test_onnx_artefacts_pass(kind):
    found = verify(open_bundle(bundle_of(kind)), model_of(kind), weights="float32", text=text_file(kind))
    assert 0 < found.logits_difference <= 1e-4


def test_the_beginning_of_a_text_may_end_within_a_character(tmp_path):
    tokenizer = open_bundle(bundle_of()).tokenizer
    text = tmp_path / "text"
    text.write_bytes(b"ab\xc3\xa9\xc3\xa9")
    read = {size: bytes(read_text(text, tokenizer, num_bytes=size).tolist()) for size in range(2, 8)}
    assert read == {size: b"ab\xc3\xa9\xc3\xa9"[: size - size % 2] for size in range(2, 8)}


def test_the_command_line_verifies(capsys):
    argv = [str(artefact_of("masked", "torchscript")), str(bundle_of()), "--text", str(text_file()), "--device", "cpu"]
    assert main(argv) == 0
    output = capsys.readouterr()
    assert output.out.startswith("replay   60 ragged steps, ")
    assert "\ntext     349 bytes: " in output.out
    assert "error" not in output.err
