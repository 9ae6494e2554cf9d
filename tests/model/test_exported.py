"""The graphs of an artefact run on the requested device and touch only the memory of their own cache."""

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch

from model.artefact import ArtefactError, open_artefact
from model.backends import LoadOptions
from model.bundle import open_bundle
from model.frozen.baked import BakedLM, bake
from model.frozen.cache import RingCache
from model.frozen.exported import ExportedLM, load_exported
from model.frozen.onnx_graphs import TWINS, check_packages, choose_provider
from model.frozen.served import ServedLM
from tests.support.agreement_bundle import build_network, text_tokens
from tests.support.artefacts import artefact_of, bundle_of, model_of
from tests.support.hand_made import onnx_graph, sealed, write_artefact

LENGTH = 190  # beyond the longest ring of 160
TOLERANCE = 1e-4
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
NO_DEVICE, NO_PROVIDER = "torch sees no CUDA device", f"onnxruntime {onnxruntime.__version__} here has no CUDA provider"


def pretend(monkeypatch: pytest.MonkeyPatch, *, provider: bool, device: bool) -> None:
    """Simulate onnxruntime with or without its CUDA provider, and torch with or without a GPU."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU] if provider else [CPU])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)


@pytest.mark.parametrize("has_provider", [True, False])
@pytest.mark.parametrize("has_device", [True, False])
@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
@pytest.mark.parametrize("provider", ["auto", "cpu", "cuda"])
def test_the_provider_is_the_one_asked_for_or_an_error(monkeypatch, device, provider, has_device, has_provider):
    pretend(monkeypatch, provider=has_provider, device=has_device)
    asked = {device, provider} - {"auto"}
    if len(asked) == 2:
        with pytest.raises(ArtefactError) as caught:
            choose_provider(device=device, provider=provider)
        assert str(caught.value) == (
            f"provider = '{provider}' contradicts device = '{device}'; let one of them be auto"
        )
    elif asked == {"cuda"} and not (has_provider and has_device):
        with pytest.raises(ArtefactError) as caught:
            choose_provider(device=device, provider=provider)
        lack = NO_DEVICE if has_provider else NO_PROVIDER
        assert str(caught.value) == f"provider = 'cuda', but {lack}; allowed here: auto, cpu"
    else:
        gpu = asked == {"cuda"} or (not asked and has_provider and has_device)
        assert choose_provider(device=device, provider=provider) == ("cuda" if gpu else "cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_artefact(tmp_path / "artefact", graph=onnx_graph(open_bundle(bundle_of()).hash))


class Fallen:
    """A session that reports the CPU, as onnxruntime does if CUDA libraries are missing."""

    asked: list[str]

    def __init__(self, file: Path, options: object, providers: list[str]) -> None:
        type(self).asked = providers

    def get_providers(self) -> list[str]:
        return [CPU]

    def get_modelmeta(self) -> SimpleNamespace:
        return SimpleNamespace(custom_metadata_map={"model_hash": open_bundle(bundle_of()).hash})


@pytest.mark.parametrize("asked", [{"provider": "cuda"}, {"device": "cuda"}, {}], ids=str)
def test_a_session_that_falls_back_to_the_cpu_is_an_error(monkeypatch, folder, asked):
    pretend(monkeypatch, provider=True, device=True)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fallen)
    with pytest.raises(ArtefactError) as caught:
        load_exported(open_artefact(folder), LoadOptions(**asked))
    assert str(caught.value).startswith(
        f"provider = 'cuda', but onnxruntime {onnxruntime.__version__} could only take CPUExecutionProvider: "
    )
    assert Fallen.asked == [CUDA]


def test_a_session_on_the_cpu_asks_for_the_cpu_alone(monkeypatch, folder):
    pretend(monkeypatch, provider=True, device=True)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fallen)
    assert load_exported(open_artefact(folder), LoadOptions(provider="cpu")).device == torch.device("cpu")
    assert Fallen.asked == [CPU]


@pytest.mark.parametrize("kind", ["torchscript", "pt2"])
@pytest.mark.parametrize(("made_on", "asked"), [("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("has_device", [True, False])
def test_graphs_of_torch_run_only_where_they_were_made(monkeypatch, tmp_path, kind, made_on, asked, has_device):
    pretend(monkeypatch, provider=True, device=has_device)
    folder = write_artefact(tmp_path / "artefact", kind=kind, device=made_on)
    with pytest.raises(ArtefactError) as caught:
        load_exported(open_artefact(folder), LoadOptions(device=asked))
    assert str(caught.value) == (
        f"device = '{asked}', but {folder} was made on '{made_on}'; export with --device {asked}"
    )


@pytest.mark.parametrize("kind", ["torchscript", "pt2"])
@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_graphs_that_were_made_on_a_gpu_need_one(monkeypatch, tmp_path, kind, asked):
    pretend(monkeypatch, provider=True, device=False)
    folder = write_artefact(tmp_path / "artefact", kind=kind, device="cuda")
    with pytest.raises(ArtefactError) as caught:
        load_exported(open_artefact(folder), LoadOptions(device=asked))
    assert str(caught.value) == f"{folder} was made on 'cuda', and torch sees no CUDA device; export with --device cpu"


@pytest.mark.parametrize("asked", [{"device": "cuda"}, {"provider": "cuda"}], ids=str)
def test_cuda_where_there_is_none_is_an_error_for_onnx(monkeypatch, folder, asked):
    pretend(monkeypatch, provider=True, device=False)
    with pytest.raises(
        ArtefactError, match="provider = 'cuda', but torch sees no CUDA device; allowed here: auto, cpu"
    ):
        load_exported(open_artefact(folder), LoadOptions(**asked))


@pytest.mark.parametrize("kind", ["torchscript", "pt2"])
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_a_provider_is_for_onnx_only(tmp_path, kind, provider):
    folder = write_artefact(tmp_path / "artefact", kind=kind)
    with pytest.raises(ArtefactError) as caught:
        load_exported(open_artefact(folder), LoadOptions(provider=provider))
    assert str(caught.value) == f"provider = '{provider}' is for ONNX artefacts; {folder} is {kind}"


@pytest.mark.parametrize("installed", [(), *[(name,) for name in TWINS], TWINS], ids=str)
def test_both_packages_of_onnxruntime_at_once_are_an_error(monkeypatch, folder, installed):
    def version(package):
        if package not in installed:
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr("model.frozen.onnx_graphs.version", version)
    if installed != TWINS:
        check_packages()
        return
    for call in (check_packages, lambda: load_exported(open_artefact(folder), LoadOptions(device="cpu"))):
        with pytest.raises(ArtefactError) as caught:
            call()
        assert str(caught.value) == (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them"
        )


def test_without_onnxruntime_an_onnx_artefact_says_what_to_install_and_others_load(monkeypatch, folder):
    monkeypatch.delitem(sys.modules, "model.frozen.onnx_graphs")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ArtefactError, match=r"onnxruntime cannot be imported .*; pip install 'allattn\[onnx\]'"):
        load_exported(open_artefact(folder), LoadOptions(device="cpu"))
    load_exported(open_artefact(artefact_of("masked", "torchscript")), LoadOptions(device="cpu"))


def test_an_artefact_s_folder_may_have_any_name(folder):
    odd = folder.rename(folder.with_name("é ü 'x' %20"))
    assert load_exported(open_artefact(sealed(odd)), LoadOptions(device="cpu")).backend == "onnx"


@pytest.fixture(scope="module", params=["torchscript", pytest.param("onnx", marks=pytest.mark.slow)])
def model(request) -> ExportedLM:
    return model_of("masked", request.param)


@pytest.fixture(scope="module")
def baked() -> BakedLM:
    return bake(build_network())


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return text_tokens(LENGTH)


def read(model: ServedLM, cache: RingCache, text: np.ndarray, *, row: int = 0) -> torch.Tensor:
    """The logits [V] after the last token of a text: the last 20 tokens one by one, the others in chunks."""
    for stretch in torch.from_numpy(text[:-20]).split(50):
        _, new = model.extend(stretch[None], cache, [row])
        cache.commit([row], new, [len(stretch)])
    for token in text[-20:].tolist():
        logits, new = model.decode(torch.full((row + 1,), token), cache)
        cache.commit([row], [pair[row:] for pair in new], [1])
    return logits[row]


def test_outputs_of_a_call_outlive_the_next_calls(model, text):
    cache = model.allocate(3)
    calls = (
        lambda token: [*flat(model.decode(torch.full((3,), token), cache))],
        lambda token: [*flat(model.extend_with_memory_share(torch.full((2, 4), token), cache, [2, 0]))],
        lambda token: [model.logits(torch.full((5, 32), float(token)))],
    )
    for call in calls:
        first = call(1)
        kept = [tensor.clone() for tensor in first]
        second = call(2)
        for tensor, copy, other in zip(first, kept, second, strict=True):
            assert torch.equal(tensor, copy)
            assert tensor.data_ptr() != other.data_ptr()
        assert not torch.equal(first[0], second[0])


def flat(found):
    for part in found:
        yield from [part] if isinstance(part, torch.Tensor) else part


def test_caches_come_and_go(model, baked, text):
    """The memory of a deleted cache may be reused by the next cache, also of another size."""
    for num_rows in (2, 2, 3, 1, 2):
        wanted = read(baked, baked.allocate(num_rows), text, row=num_rows - 1)
        found = read(model, model.allocate(num_rows), text, row=num_rows - 1)  # freed as soon as it is read
        assert (found - wanted).abs().max() <= TOLERANCE


def test_two_caches_take_turns(model, baked, text):
    caches = [model.allocate(1), model.allocate(1)]
    streams = [text, text[::-1].copy()]
    references = [baked.allocate(1), baked.allocate(1)]
    for place in range(0, LENGTH):
        for cache, reference, stream in zip(caches, references, streams, strict=True):
            token = torch.from_numpy(stream[place : place + 1])
            found = []
            for each, own in ((model, cache), (baked, reference)):
                logits, new = each.decode(token, own)
                own.commit([0], new, [1])
                found.append(logits)
            assert (found[0] - found[1]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("rows", [[3, 1], [0, 4, 2], [4], [1, 2, 3], [4, 3, 2, 1, 0]], ids=str)
def test_any_rows_in_any_order_extend(model, baked, text, rows):
    caches = [model.allocate(5), baked.allocate(5)]
    found = []
    for each, cache in zip((model, baked), caches, strict=True):
        stretches = torch.from_numpy(np.stack([text[row : row + 170] for row in range(5)]))
        _, new = each.extend(stretches, cache, range(5))
        cache.commit(range(5), new, [170, 10, 90, 30, 169])
        hidden, new, share = each.extend_with_memory_share(
            torch.from_numpy(text[: 7 * len(rows)]).view(-1, 7), cache, rows
        )
        cache.commit(rows, new, [7] * len(rows))
        logits, _ = each.decode(torch.arange(5), cache)
        found.append([each.logits(hidden.flatten(0, 1)), share, logits, *new])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE


def test_a_step_leaves_the_cache_as_it_was(model, text):
    cache = model.allocate(2)
    read(model, cache, text)
    before = [ring.clone() for layer in cache.rings for ring in layer]
    lengths = cache.lengths.copy()
    model.decode(torch.tensor([1, 2]), cache)
    model.extend(torch.ones(2, 9, dtype=torch.int64), cache, [1, 0])
    assert all(torch.equal(a, b) for a, b in zip(before, (r for layer in cache.rings for r in layer), strict=True))
    assert cache.lengths.tolist() == lengths.tolist()


def test_tokens_need_not_lie_together(model, text):
    cache = model.allocate(2)
    wide = torch.from_numpy(text[:60]).view(2, 30)
    hidden, _ = model.extend(wide[:, ::3], cache, [0, 1])
    expected, _ = model.extend(wide[:, ::3].contiguous(), cache, [0, 1])
    assert torch.equal(hidden, expected)
    logits, _ = model.decode(wide[:, 3], cache)
    assert torch.equal(logits, model.decode(wide[:, 3].contiguous(), cache)[0])
