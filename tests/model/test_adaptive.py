"""Adaptive input and softmax: against torch's module and the dense form; memory, the server's slices, training."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.adaptive import AdaptiveOutput
from model.config import ModelConfig
from model.frozen.baked import BakedLM, bake
from model.frozen.served import score_positions
from model.network.network import AllAttentionLM
from model.sampling import draw as sampling
from model.sampling.draw import score_targets
from model.sampling.params import SamplingParams
from server.config import EngineOptions
from server.engine.engine import Engine
from server.engine.runner import ModelRunner
from server.protocol.messages import Generate
from tests.support.agreement_bundle import ADAPTIVE, build_network, text_tokens, tokenizer_of
from tests.support.artefacts import EACH_BACKEND, named_backend, served_folder
from training.config import DataConfig, OptimConfig, RunConfig
from training.loop import Run

SHAPE: dict[str, Any] = {"num_layers": 1, "width": 16, "num_heads": 2, "num_persistent": 3, "max_span": 8}
WORDS: dict[str, Any] = SHAPE | ADAPTIVE | {"vocab_size": 20}
WIKITEXT103: dict[str, Any] = WORDS | {"width": 64, "vocab_size": 267735, "adaptive_cutoffs": (20000, 40000, 200000)}
ROOT = Path(__file__).parents[2]


def network_of(**shape: Any) -> AllAttentionLM:
    """A network in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return AllAttentionLM(ModelConfig.model_validate(shape)).double()


def states(num_positions: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(num_positions, 16, generator=generator, dtype=torch.float64).to(dtype)


def test_the_output_equals_torchs_adaptive_softmax_where_that_can_say_the_same() -> None:
    network = network_of(**WORDS)
    output, tables = network.output, network._tables
    assert isinstance(output, AdaptiveOutput)
    with torch.no_grad():
        for bias in output.biases[1:]:
            bias.zero_()  # torch has no bias in the tails
    theirs = nn.AdaptiveLogSoftmaxWithLoss(16, 20, [5, 9], div_value=4, head_bias=True, dtype=torch.float64)
    from_the_end = output.cluster.weight.flip(0), output.cluster.bias.flip(0)
    with torch.no_grad():
        theirs.head.weight.copy_(torch.cat((tables[0], from_the_end[0])) @ output.projections[0].weight.mT)
        theirs.head.bias.copy_(torch.cat((output.biases[0], from_the_end[1])))
        for tail, table, projection in zip(theirs.tail, tables[1:], output.projections[1:], strict=True):
            tail[0].weight.copy_(projection.weight.mT)
            tail[1].weight.copy_(table)
    hidden, targets = states(40), torch.arange(40) % 20
    torch.testing.assert_close(network.logits(hidden), theirs.log_prob(hidden).float(), rtol=1e-6, atol=1e-6)
    assert network.loss(hidden, targets).item() == pytest.approx(-theirs(hidden, targets).output.sum().item())


def test_logits_are_log_probabilities_of_all_words() -> None:
    logprobs = network_of(**WORDS).logits(states(6).view(2, 3, 16))
    assert logprobs.shape == (2, 3, 20)
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("targets", [range(20), range(9), [19] * 4], ids=["all clusters", "not the last", "only it"])
def test_the_loss_and_its_gradients_equal_those_of_the_dense_form(targets: Any) -> None:
    network, wanted = network_of(**WORDS), torch.tensor(list(targets))
    hidden = states(len(wanted)).requires_grad_()
    output = network.output
    assert isinstance(output, AdaptiveOutput)
    leaves = [hidden, *network._tables, *output.parameters()]
    loss = network.loss(hidden, wanted)
    dense = -network.logits(hidden).double().gather(-1, wanted[:, None]).sum()  # rounded to fp32 in between
    assert loss.item() == pytest.approx(dense.item(), rel=1e-6)
    for found, expected in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(dense, leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_input_and_the_output_share_their_tables_and_both_train_them() -> None:
    network = network_of(**WORDS)
    tokens, targets = torch.tensor([[2, 7, 12]]), torch.tensor([[3, 8, 15]])
    hidden, _ = network(tokens, network.init_cache(1))
    network.loss(hidden, targets).backward()
    gradients = torch.cat([table.weight.grad.abs().sum(-1) for table in network.embedding.tables])
    unseen = torch.autograd.grad(network.embedding(tokens).square().sum(), network._tables)
    by_input = torch.cat([gradient.abs().sum(-1) for gradient in unseen])
    assert by_input.nonzero()[:, 0].tolist() == [2, 7, 12]
    assert (gradients > 0).all()  # each word of a cluster that occurs takes part in its softmax
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_under_autocast_products_are_rounded_and_nothing_else() -> None:
    network = network_of(**WORDS).float()
    hidden, targets = states(40, torch.float32), torch.arange(40) % 20
    exact = network.loss(hidden, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert network.embedding(targets).dtype == torch.float32
        rounded = network.loss(hidden, targets)
        assert network.logits(hidden).dtype == torch.float32
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.01)
    assert rounded.item() != exact.item()


def test_parameters_have_the_names_and_shapes_that_the_config_lists() -> None:
    network = network_of(**WORDS)
    wanted = network.config.tensor_shapes()
    assert {name: tuple(p.shape) for name, p in network.named_parameters()} == wanted
    assert network.state_dict().keys() == wanted.keys()


def test_the_papers_word_model_holds_as_many_numbers_as_its_closed_form_says() -> None:
    config = ModelConfig.model_validate(WIKITEXT103 | {"width": 512, "num_heads": 8})
    with torch.device("meta"):
        network = AllAttentionLM(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == config.num_parameters


def test_a_new_word_model_starts_as_the_official_code_does() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = WORDS | {"width": 64, "vocab_size": 3000, "adaptive_cutoffs": (1000, 2000)}
        network = AllAttentionLM(ModelConfig.model_validate(shape))
    output = network.output
    assert isinstance(output, AdaptiveOutput)
    for table, *projections, bias, width in zip(
        network._tables, network.embedding.projections, output.projections, output.biases, (64, 16, 4), strict=True
    ):
        assert table.std().item() == pytest.approx(1, rel=0.05)
        for projection in projections:
            assert projection.weight.abs().max().item() == pytest.approx(width**-0.5, rel=0.02)
        assert bias.abs().max().item() == pytest.approx(width**-0.5, rel=0.02)


def test_in_bfloat16_the_baked_model_gives_nearly_the_same_distribution() -> None:
    network = build_network("words")
    exact, rounded = bake(network), bake(network, dtype=torch.bfloat16)
    assert {buffer.dtype for buffer in rounded.buffers()} == {torch.bfloat16}
    tokens = torch.from_numpy(text_tokens(200, "words"))[None]
    logprobs = [model.logits(model.extend(tokens, model.allocate(1), [0])[0]) for model in (exact, rounded)]
    assert logprobs[1].dtype == torch.float32
    torch.testing.assert_close(logprobs[1].exp().sum(-1), torch.ones(1, 200))
    assert (logprobs[0].exp() - logprobs[1].exp()).abs().max() < 0.1
    assert (logprobs[0].exp() - logprobs[1].exp()).abs().mean() < 0.003


def baked_words() -> BakedLM:
    return bake(build_network("words"))


@pytest.mark.parametrize("extras", [{}, {"num_top": 3, "entropy": True}], ids=str)
@pytest.mark.parametrize("num_targets", [0, 1, 15, 32])
def test_a_model_scores_slices_bit_for_bit_as_the_whole(
    num_targets: int, extras: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, targets = baked_words(), torch.from_numpy(text_tokens(32, "words"))[:num_targets]
    hidden = torch.randn(32, 32, generator=torch.Generator().manual_seed(3))
    whole = score_targets(model.logits(hidden)[:num_targets], targets, **extras)
    read: list[int] = []
    logits = BakedLM.logits

    def recorded(self: BakedLM, hidden: Tensor) -> Tensor:
        read.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(BakedLM, "logits", recorded)
    monkeypatch.setattr(sampling, "SCRATCH_BYTES", {"cpu": 1})
    sliced = score_positions(model, hidden, targets, **extras)
    assert read == [4] * max(1, -(-num_targets // 4))
    for one, other in zip(sliced, whole, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_the_bits_of_a_word_depend_on_no_other_word_in_the_batch() -> None:
    adaptive = bake(network_of(**WIKITEXT103).float()).adaptive
    assert adaptive is not None
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(267735, (32,), generator=generator)
    hidden = torch.randn(32, 64, generator=generator)
    vectors, logits = adaptive.embed(tokens), adaptive.logits(hidden)
    for rows in (4, 7, 16):  # a CPU sums in another order below 4, see server.runner
        assert torch.equal(adaptive.embed(tokens[:rows]), vectors[:rows])
        assert torch.equal(adaptive.logits(hidden[:rows]), logits[:rows])
    for other in (0, 25000, 267734):  # all of one cluster
        others = torch.full_like(tokens, other)
        others[3] = tokens[3]
        assert torch.equal(adaptive.embed(others)[3], vectors[3])


@pytest.mark.parametrize("backend", EACH_BACKEND)
def test_a_model_of_words_is_served(backend) -> None:
    options = EngineOptions(
        bundle=served_folder("words", backend),
        backend=named_backend(backend),
        num_rows=2,
        device="cpu",
        num_threads=1,
        chunk_tokens=16,
        budget_tokens=32,
    )
    runner = ModelRunner.load(options)
    assert runner.model.backend == backend
    engine = Engine(runner, options)
    prompt = text_tokens(40, "words").astype("<i4").tobytes()
    engine.submit(Generate("a", prompt, SamplingParams(temperature=1.0, top_p=0.9, num_top=3, seed=1), 12))
    tokens = []
    while engine.has_work:
        tokens += [token.token for token in engine.step().tokens]
    assert len(tokens) == 12
    assert tokenizer_of("words").decode(tokens)


def test_training_a_word_model_lowers_its_loss() -> None:
    tokens = text_tokens(400, "words")
    config = RunConfig.model_construct(
        data=DataConfig(name="shakespeare", batch=4, block=16),
        optim=OptimConfig(lr=0.01, max_steps=30),
        device="cpu",
        dtype="bfloat16",
        seed=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        shape = SHAPE | ADAPTIVE | {"vocab_size": tokenizer_of("words").vocab_size, "dropout": 0.1}
        run = Run(config, AllAttentionLM(ModelConfig.model_validate(shape)), tokens)
        before = {name: parameter.detach().clone() for name, parameter in run.network.named_parameters()}
        losses = [run.step().loss for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    still = [name for name, parameter in run.network.named_parameters() if torch.equal(parameter, before[name])]
    assert not still


MEMORY = """
import resource, sys
import numpy as np, torch
sys.path.insert(0, ".")
from tests.model.test_adaptive import WIKITEXT103
from model.frozen.baked import bake
from model.frozen.served import score_document, score_positions
from model.config import ModelConfig
from model.network.network import AllAttentionLM
from model.sampling.draw import Draws, draw
from model.sampling.params import SamplingParams
from server.config import EngineOptions
from server.engine.runner import ModelRunner
network = AllAttentionLM(ModelConfig.model_validate(WIKITEXT103))
model = bake(network)
tokens = np.random.default_rng(0).integers(267735, size={num_tokens} + 1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
{work}
print(peak() - before)
"""
SCORE = """
for _ in score_document(model, tokens):
    pass
hidden, _ = model.extend(torch.from_numpy(tokens[None, :64]), model.allocate(1), [0])
score_positions(model, hidden[0], torch.from_numpy(tokens[1:65]), num_top=20, entropy=True)
"""
LEARN = """
hidden = torch.randn({num_tokens}, 64, requires_grad=True)
network.loss(hidden, torch.from_numpy(tokens[1:])).backward()
"""

DRAW = """
line = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, typical_p=0.9, min_p=0.01, num_top=5)
draw(torch.randn(32, 267735), Draws([line] * 32), positions=[1] * 32, num_generated=[1] * 32)
"""
WARM_UP = """
ModelRunner(model, EngineOptions(num_rows=8)).warm_up()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "mib"),
    [(SCORE, 64), (LEARN, 96), (DRAW, 160), (WARM_UP, 160)],
    ids=["scoring", "learning", "drawing", "warming up"],
)
def test_memory_is_bounded_over_a_vocabulary_of_267735_words(work: str, mib: int) -> None:
    """Scores of 2000 positions would be 2043 MiB, of a chunk of 256 copies of 262, of a batch of 32 copies of 33."""
    program = MEMORY.format(num_tokens=2000, work=work.format(num_tokens=2000))
    freed_at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # so that what the allocator keeps for later is not counted
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | freed_at_once,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < mib
