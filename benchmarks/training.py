"""Compare the speed of training with the paper's formulation written out and with a GPT of the same size.

`python -m benchmarks.training [--dtype bfloat16] [--device cuda] [--compile]` trains four models in turn, each in its
own process, a few steps at a time, so that other load of the machine affects all models alike:

- ours: `training.loop.Run`, as in `python -m training.run`;
- keys: the same with `--cache keys`, which caches the keys and values of earlier blocks;
- naive: the same network in the paper's formulation: every head attends over the whole maximum span, scores are moved
  from keys to distances and back, softmax and mask normalise separately, the loss needs the scores of the whole block;
- gpt: a pre-norm transformer with feed-forward layers, as in nanoGPT, with torch's scaled_dot_product_attention, the
  same number of parameters, the same vocabulary and a context of L tokens.

All models train on the same number of random tokens a step (speed does not depend on the tokens), with AdamW. Reports
tokens/s (median step), the achieved arithmetic as a share of that of a large matrix product on the same machine, and
peak memory. Prints one line of JSON for each case.

Sizes: B streams, M tokens of a block, T tokens of the GPT's context, L maximum span, N persistent vectors, H heads,
D head size, E width.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.network.network import AllAttentionLM
from training.config import RunConfig, load_config
from training.loop import Run

CONTENDERS = ("ours", "keys", "naive", "gpt")
ROUNDS = 6  # of STEPS steps of each model; the first round warms up
STEPS = 2


class NaiveLM(nn.Module):
    """The paper's formulation of the network, with the weights of an `AllAttentionLM`."""

    def __init__(self, network: AllAttentionLM) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor, targets: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The mean cross-entropy of a block [B, M] in nats, and the caches [B, L, E] for the next block."""
        network, limit = self.network, self.network.config.max_span
        hidden = network.embedding(tokens)
        kept = []
        for layer, cache in zip(network.layers, caches, strict=True):
            context = torch.cat((cache, hidden), 1)  # [B, L + M, E]
            kept.append(context[:, -limit:].detach())
            hidden = layer.norm(hidden + layer.out(self._attend(layer, hidden, context)))
        scores = network.output(hidden).float()
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten()), kept

    def _attend(self, layer: Any, hidden: Tensor, context: Tensor) -> Tensor:
        config: ModelConfig = self.network.config
        limit, size = config.max_span, config.head_size
        query, key, value = (
            projection(x).unflatten(-1, (config.num_heads, size)).transpose(1, 2)  # [B, H, T, D]
            for projection, x in ((layer.query, hidden), (layer.key, context), (layer.value, context))
        )
        scores = _by_distance(query @ key.mT) + query @ self.network.position.flip(-1)  # [B, H, M, L]
        shared = query @ (layer.persistent_key * math.sqrt(size)).mT  # [B, H, M, N]
        joint = torch.softmax(torch.cat((scores, shared), -1).float() / math.sqrt(size), -1)
        distance = torch.arange(limit, 0, -1, device=hidden.device, dtype=torch.float32)  # oldest first, like the keys
        reach = layer.span[:, None] * limit
        mask = ((1 - distance + reach) / config.span_ramp + 1).clamp(0, 1)[:, None]  # [H, 1, L]
        context_part, shared_part = joint[..., :limit] * mask, joint[..., limit:]
        total = context_part.sum(-1, keepdim=True) + shared_part.sum(-1, keepdim=True)
        context_part, shared_part = context_part / total, shared_part / total
        values = layer.persistent_value * math.sqrt(config.num_persistent)
        mixed = _by_key(context_part).to(value.dtype) @ value + shared_part.to(value.dtype) @ values.to(value.dtype)
        return mixed.transpose(1, 2).flatten(2)


def _by_distance(by_key: Tensor) -> Tensor:
    """Columns by key [..., M, L + M] to columns by distance [..., M, L]: row t has its L keys from column t on."""
    *lead, rows, width = by_key.shape
    padded = F.pad(by_key.flatten(-2), (0, rows))
    return padded.view(*lead, rows, width + 1)[..., : width - rows]


def _by_key(by_distance: Tensor) -> Tensor:
    """Columns by distance [..., M, L] to columns by key [..., M, L + M], zero elsewhere."""
    *lead, rows, slots = by_distance.shape
    padded = F.pad(by_distance, (0, rows + 1)).flatten(-2)
    return padded[..., : rows * (slots + rows)].view(*lead, rows, slots + rows)


class GptBlock(nn.Module):
    """A pre-norm transformer block: attention and a feed-forward layer."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, E] -> [B, T, E]."""
        parts = self.qkv(self.norms[0](hidden)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*parts, is_causal=True)
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        return hidden + self.down(F.gelu(self.up(self.norms[1](hidden))))


class Gpt(nn.Module):
    """A GPT with about as many parameters as `config` has; input and output embeddings are not tied, like ours."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        outside = (2 * config.vocab_size + config.max_span) * width
        num_layers = max(1, round((config.num_parameters - outside) / (12 * width * width)))
        self.tokens, self.places = nn.Embedding(config.vocab_size, width), nn.Embedding(config.max_span, width)
        self.blocks = nn.Sequential(*(GptBlock(width, config.num_heads) for _ in range(num_layers)))
        self.norm, self.output = nn.LayerNorm(width, bias=False), nn.Linear(width, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of tokens [B, T] in nats."""
        hidden = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        scores = self.output(self.norm(self.blocks(hidden)))
        return F.cross_entropy(scores.flatten(0, 1).float(), targets.flatten())


Step = Callable[[], None]


def ours(config: RunConfig, tokens: np.ndarray) -> tuple[Step, nn.Module]:
    """The training step of `training.loop.Run`, and its network."""
    network = _network(config)
    run = Run(config, network, tokens)

    def step() -> None:
        run.step()

    return step, network


def keys(config: RunConfig, tokens: np.ndarray) -> tuple[Step, nn.Module]:
    """The training step of `training.loop.Run` with cached keys and values."""
    return ours(config.model_copy(update={"cache": "keys"}), tokens)


def naive(config: RunConfig, tokens: np.ndarray) -> tuple[Step, nn.Module]:
    """The training step of the paper's formulation."""
    module = NaiveLM(_network(config)).to(_device(config))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    inputs, targets = _block(config, tokens, streams=config.data.batch, length=config.data.block)
    limit, width = module.network.config.max_span, module.network.config.width
    caches = [inputs.new_zeros(len(inputs), limit, width, dtype=torch.float32) for _ in module.network.layers]

    def step() -> None:
        nonlocal caches
        with _autocast(config):
            loss, caches = module(inputs, targets, caches)
        _learn(loss, optimizer, module)

    return step, module


def gpt(config: RunConfig, tokens: np.ndarray) -> tuple[Step, nn.Module]:
    """The training step of the GPT, on as many tokens, in streams of its context length."""
    module = Gpt(_model(config)).to(_device(config))
    if config.compile:
        module.compile()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    length = config.model.max_span
    streams = max(1, config.data.batch * config.data.block // length)
    inputs, targets = _block(config, tokens, streams=streams, length=length)

    def step() -> None:
        with _autocast(config):
            loss = module(inputs, targets)
        _learn(loss, optimizer, module)

    return step, module


def _learn(loss: Tensor, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    float(loss.detach())


def _model(config: RunConfig) -> ModelConfig:
    return config.model.with_vocabulary(config.tokenizer.vocab_size or 256)


def _network(config: RunConfig) -> AllAttentionLM:
    """The network with spans of `span_init`, which a few steps at a low learning rate do not change."""
    return AllAttentionLM(_model(config))


def _device(config: RunConfig) -> torch.device:
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(auto if config.device == "auto" else config.device)


def _autocast(config: RunConfig) -> torch.autocast:
    return torch.autocast(_device(config).type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def _block(config: RunConfig, tokens: np.ndarray, *, streams: int, length: int) -> tuple[Tensor, Tensor]:
    both = torch.from_numpy(tokens[: streams * (length + 1)].astype(np.int64)).view(streams, -1).to(_device(config))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def flops_per_token(config: RunConfig, contender: str) -> float:
    """Floating-point operations of forward and backward for a token, if no head attends beyond its span."""
    model = _model(config)
    width, head = model.width, model.head_size
    if contender == "gpt":
        dense = sum(p.numel() for p in Gpt(model).parameters()) - (model.vocab_size + model.max_span) * width
        blocks = (dense - model.vocab_size * width) // (12 * width * width)
        return 6.0 * (dense + blocks * model.max_span * width)  # causal: half of 2 L E
    slots = min(model.max_span, math.ceil(model.span_init * model.max_span) + model.span_ramp)
    context = 3 * slots * head * model.num_heads  # keys, positions, values
    persistent = 2 * model.num_persistent * head * model.num_heads
    return 6.0 * (model.num_layers * (4 * width * width + persistent + context) + model.vocab_size * width)


def peak_flops(config: RunConfig) -> float:
    """Floating-point operations per second of a large matrix product."""
    device, dtype = _device(config), torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(5):
        begun = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def serve_contender(name: str, flags: list[str]) -> None:
    """Run a child process: for each line on stdin take STEPS steps and print their seconds; at the end peak memory."""
    config = load_config(flags)
    torch.set_num_threads(config.num_threads or torch.get_num_threads())
    torch.manual_seed(1)
    tokens = np.random.default_rng(0).integers(config.tokenizer.vocab_size or 256, size=2_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step, module = {"ours": ours, "keys": keys, "naive": naive, "gpt": gpt}[name](config, tokens.astype(np.int32))
    cuda = _device(config).type == "cuda"
    for _ in sys.stdin:
        begun = time.perf_counter()
        for _ in range(STEPS):
            step()
        if cuda:
            torch.cuda.synchronize()
        print(json.dumps({"seconds": (time.perf_counter() - begun) / STEPS}), flush=True)
    peak = (
        torch.cuda.max_memory_allocated()
        if cuda
        else 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    )
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    print(json.dumps({"peak_bytes": peak, "num_parameters": num_parameters}), flush=True)


def measure(flags: list[str], contenders: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """For each model the median seconds a step, tokens/s, share of the peak and memory; the models take turns."""
    config = load_config(flags)
    base = [sys.executable, "-m", "benchmarks.training", "--contender"]
    children = {
        name: subprocess.Popen([*base, name, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in contenders
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, child in children.items():
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            seconds[name].append(json.loads(child.stdout.readline())["seconds"])
    peak, num_tokens = peak_flops(config), config.data.batch * config.data.block
    results = {}
    for name, child in children.items():
        last = json.loads(child.communicate()[0])
        step = statistics.median(seconds[name][1:])
        results[name] = {
            "num_parameters": last["num_parameters"],
            "seconds_a_step": step,
            "tokens_per_second": num_tokens / step,
            "share_of_peak": flops_per_token(config, name) * num_tokens / step / peak,
            "peak_bytes": last["peak_bytes"],
        }
    return results


def main() -> None:
    """Measure every case and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/default.toml", help="the shape and the batch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", help="both if not given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--num-threads", type=int, default=None, help="of the CPU; empty = as many as cores")
    parser.add_argument("--compile", action="store_true", help="torch.compile ours and the GPT")
    parser.add_argument("--spans", type=float, action="append", help="shares of the maximum span, for all heads")
    arguments = parser.parse_args()
    for dtype in arguments.dtype or ("float32", "bfloat16"):
        for span in arguments.spans or (1.0, 0.1):
            with tempfile.TemporaryDirectory() as folder:
                flags = [arguments.config, "--out", str(Path(folder) / "none"), "--dtype", dtype]
                flags += ["--device", arguments.device, "--model.span_init", str(span), "--optim.lr", "1e-9"]
                flags += ["--optim.name", "adamw", "--compile", str(arguments.compile).lower()]
                if arguments.num_threads:
                    flags += ["--num_threads", str(arguments.num_threads)]
                results = measure(flags, CONTENDERS)
            ratios = {
                f"ours_over_{name}": results["ours"]["tokens_per_second"] / results[name]["tokens_per_second"]
                for name in ("naive", "gpt")
            }
            machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
            print(json.dumps({"device": machine, "dtype": dtype, "span": span, **results, **ratios}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contender"]:
        serve_contender(sys.argv[2], sys.argv[3:])
    else:
        main()
