"""`python -m training.run [CONFIG.toml] [--section.key value ...]`: corpus to bundle, in the order it happens."""

import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from model.baked import bake
from model.bundle import BundleError, save_bundle
from model.network import AllAttentionLM
from training.card import bundle_card, training_facts
from training.checkpoint import CheckpointError, load_latest, save_checkpoint
from training.config import ConfigError, RunConfig, load_config
from training.corpus import CorpusError, Dataset, prepare
from training.evaluate import evaluate
from training.loop import NonFiniteLossError, Run
from training.progress import ProgressBar, StopSignal


def main(argv: list[str]) -> int:
    """Train, evaluate and write the bundle; returns the exit status."""
    try:
        config = load_config(argv)
        dataset = prepare(config.data, config.tokenizer)
        run = begin(config, dataset)
        if not train(run, dataset):
            print(f"stopped after step {run.step_count}; the same command goes on from there", file=sys.stderr)
            return 130
        publish(run, dataset)
    except (ConfigError, CorpusError, CheckpointError, NonFiniteLossError, BundleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shutil.rmtree(checkpoints_of(config), ignore_errors=True)
    print(f"wrote {config.out}; to serve it:\n  make serve BUNDLE={config.out}")
    return 0


def begin(config: RunConfig, dataset: Dataset) -> Run:
    """A fresh run, or the one whose checkpoint lies beside the bundle."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    network = AllAttentionLM(config.model.with_vocabulary(dataset.tokenizer.vocab_size))
    run = Run(config, network, dataset.train)
    print(
        f"{network.config.num_parameters / 1e6:.2f} M parameters on {run.device}; {dataset.name}: "
        f"{len(dataset.train):,} tokens, vocabulary {network.config.vocab_size:,}"
    )
    state = load_latest(checkpoints_of(config), config=settings(config))
    if state is not None:
        run.restore(state["run"])
        print(f"going on after step {run.step_count}")
    return run


def train(run: Run, dataset: Dataset) -> bool:
    """Step until the run is done; False if a signal ended it before, with everything saved.

    Raises:
        NonFiniteLossError: see `Run.step`.
    """
    config = run.config
    nats_per_bit = dataset.train_bytes / len(dataset.train) * math.log(2)
    saved = time.monotonic()
    with StopSignal() as stop, ProgressBar(nats_per_bit=nats_per_bit, share=run.share) as bar:
        for report in run.steps():
            bar.show(report, share=run.share)
            if report.step % config.eval.every_steps == 0:
                bar.note(report, valid=run.loss_on(dataset.valid[: config.eval.tokens]))
            if stop.asked or time.monotonic() - saved > config.checkpoint.every_seconds:
                save(run)
                saved = time.monotonic()
            if stop.asked:
                return False
    save(run)
    return True


def publish(run: Run, dataset: Dataset) -> None:
    """Evaluate what will be served, and write it as a bundle."""
    baked = bake(run.network.cpu())
    splits = {"valid": dataset.valid} | ({} if dataset.test is None else {"test": dataset.test})
    evaluations = {
        name: evaluate(baked, dataset.tokenizer, tokens, label=f"evaluate {name}") for name, tokens in splits.items()
    }
    for name, evaluation in evaluations.items():
        score = evaluation.score
        print(f"{name}: {score.bits_per_byte:.4f} bits/byte, {-score.logprob / score.num_chars:.4f} nats/character")
    facts = training_facts(run, evaluations, baked, data=dataset.name)
    save_bundle(
        run.config.out,
        config=baked.config,
        tokenizer=dataset.tokenizer,
        tensors={name: tensor.numpy() for name, tensor in run.network.state_dict().items()},
        card=bundle_card(facts, baked, name=run.config.out.name, notes=run.config.notes),
        training=facts,
    )


def save(run: Run) -> None:
    """Write a checkpoint."""
    config = run.config
    state = {"step": run.step_count, "config": settings(config), "run": run.state()}
    save_checkpoint(checkpoints_of(config), state, keep=config.checkpoint.keep)


def checkpoints_of(config: RunConfig) -> Path:
    """Where the run keeps its checkpoints: beside the bundle it will write."""
    return config.out.with_name(config.out.name + ".run")


def settings(config: RunConfig) -> dict[str, Any]:
    """What must be the same for a run to go on: all that decides its numbers."""
    places = {"data": {"path", "cache_dir"}}
    parts = {"seed", "dtype", "model", "data", "tokenizer", "optim"}
    return config.model_dump(mode="json", include=parts, exclude=places)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
