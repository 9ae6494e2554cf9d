"""`python -m training.run [CONFIG.toml] [--section.key value ...]`: train a model on a corpus and write a bundle.

On several devices: `torchrun --nproc-per-node N -m training.run ...`; every process runs this program.
"""

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.bundle import BundleError, save_bundle
from model.frozen.baked import bake
from model.network.network import AllAttentionLM
from training.card import bundle_card, training_facts
from training.checkpoint import (
    CheckpointError,
    delete_checkpoints,
    forget_best,
    load_best,
    load_latest,
    save_best,
    save_checkpoint,
)
from training.config import ConfigError, RunConfig, load_config
from training.corpus import CorpusError, Dataset, prepare
from training.devices import Devices, join, leave
from training.evaluate import evaluate
from training.loop import NonFiniteLossError, Report, Run
from training.progress import StopSignal
from training.record import RecordError, read_metrics
from training.watch import Watch

PROBLEMS = (ConfigError, CorpusError, CheckpointError, NonFiniteLossError, RecordError, BundleError)


def main(argv: list[str]) -> int:
    """Train, evaluate and write the bundle; returns the exit status."""
    try:
        config = load_config(argv)
        with join(config) as devices:
            dataset = read(config, devices)
            run = begin(config, dataset, devices)
            finished = train(run, dataset)
            weights = run.weights()
        if not devices.is_first:
            return 0 if finished else 130
        if not finished:
            print(f"stopped after step {run.step_count}; the same command goes on from there", file=sys.stderr)
            return 130
        publish(run, dataset, weights)
    except PROBLEMS as error:
        rank = int(os.environ.get("RANK", "0"))
        print(f"error: {error}" if rank == 0 else f"error (process {rank}): {error}", file=sys.stderr)
        return 1
    delete_checkpoints(checkpoints_of(config))
    print(f"wrote {config.out}; to serve it:\n  make serve BUNDLE={config.out}")
    return 0


def read(config: RunConfig, devices: Devices) -> Dataset:
    """The corpus as tokens. Rank 0 fills the cache first; the other ranks then read it."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if not devices.is_first:
        devices.wait()
    dataset = prepare(config.data, config.tokenizer)
    if devices.is_first:
        devices.wait()
    return dataset


def begin(config: RunConfig, dataset: Dataset, devices: Devices) -> Run:
    """A fresh run, or the run that the checkpoint beside the bundle resumes."""
    torch.manual_seed(config.seed)  # so that all devices draw the same weights
    network = AllAttentionLM(config.model.with_vocabulary(dataset.tokenizer.vocab_size))
    run = Run(config, network, dataset.train, devices=devices)
    count = f"{devices.size} x {run.device.type}, {config.parallel}" if devices.size > 1 else str(run.device)
    devices.say(
        f"{network.config.num_parameters / 1e6:.2f} M parameters on {count}; {dataset.name}: "
        f"{len(dataset.train):,} tokens, vocabulary {network.config.vocab_size:,}"
    )
    state = load_latest(checkpoints_of(config), config=settings(config))
    step = 0 if state is None else state["step"]
    if devices.of_first(step) != step:
        raise CheckpointError(f"{checkpoints_of(config)} is not the same folder for all processes; it must be shared")
    if state is not None:
        run.restore(state["run"])
        devices.say(f"going on after step {run.step_count}")
        for key, value in length(config).items():
            if value != state["length"][key]:
                devices.say(f"{key} was {state['length'][key]} and is {value} from now on")
    return run


def train(run: Run, dataset: Dataset) -> bool:
    """Train until the run is done; False if a signal stopped it early, after a checkpoint was saved.

    Raises:
        NonFiniteLossError: see `Run.step`.
    """
    config, saved = run.config, time.monotonic()
    best = best_so_far(run)
    train_unit, valid_unit = dataset.nats_per_bit(dataset.train), valid_nats_per_bit(run, dataset)
    watching = Watch(run, folder_of(config), nats_per_bit=train_unit, valid_nats_per_bit=valid_unit)
    with StopSignal() as stop, watching as watch:
        for report in run.steps():
            watch.step(report)
            if report.step % config.eval.every_steps == 0 or run.share == 1:
                best = look(run, dataset, report, watch, best=best)
            stopping, due = run.devices.any(stop.asked, time.monotonic() - saved > config.checkpoint.every_seconds)
            if stopping or due:
                save(run)
                saved = time.monotonic()
            if stopping:
                return False
    save(run)
    return True


def look(run: Run, dataset: Dataset, report: Report, watch: Watch, *, best: float) -> float:
    """Validate, save the weights if the loss on the validation split is below `best`, and return the lower loss."""
    valid = run.loss_on(dataset.valid[: run.config.eval.tokens])
    watch.look(report, valid=valid)
    if not valid < best:
        return best
    kept = {"step": run.step_count, "valid": valid, "tokens": run.config.eval.tokens, "network": run.weights()}
    if run.devices.is_first:
        save_best(checkpoints_of(run.config), kept)
    return valid


def best_so_far(run: Run) -> float:
    """The lowest validation loss so far, the same number on all devices; infinite in a fresh run."""
    least = math.inf
    if run.devices.is_first:
        best = load_best(checkpoints_of(run.config))
        if best is not None and run.step_count and best["tokens"] == run.config.eval.tokens:
            least = best["valid"]
        else:
            forget_best(checkpoints_of(run.config))
    return run.devices.of_first(least)


def publish(run: Run, dataset: Dataset, weights: dict[str, Tensor]) -> None:
    """Evaluate the best weights (the last weights if none were saved as best) and write them as a bundle."""
    step, best = run.step_count, load_best(checkpoints_of(run.config))
    if best is not None and best["step"] != step:
        step, weights = best["step"], best["network"]
        bits = best["valid"] / valid_nats_per_bit(run, dataset)
        print(
            f"of all looks at valid that of step {step} was the best, {bits:.4f} bits/byte: its weights are published"
        )
    network = AllAttentionLM(run.network.config)
    network.load_state_dict(weights)
    baked = bake(network)
    splits = {"valid": dataset.valid} | ({} if dataset.test is None else {"test": dataset.test})
    evaluations = {
        name: evaluate(baked, dataset.tokenizer, tokens, label=f"evaluate {name}") for name, tokens in splits.items()
    }
    for name, evaluation in evaluations.items():
        score = evaluation.score
        print(f"{name}: {score.bits_per_byte:.4f} bits/byte, {-score.logprob / score.num_chars:.4f} nats/character")
    from training.plots import pictures  # imports matplotlib, which takes a second, so only here

    drawn = pictures(read_metrics(folder_of(run.config)), baked, dataset.valid)
    facts = training_facts(run, evaluations, baked, data=dataset.name) | {"weights_of_step": step}
    save_bundle(
        run.config.out,
        config=baked.config,
        tokenizer=dataset.tokenizer,
        tensors={name: tensor.numpy() for name, tensor in network.state_dict().items()},
        card=bundle_card(facts, baked, name=run.config.out.name, notes=run.config.notes, pictures=list(drawn)),
        training=facts,
        pictures=drawn,
    )


def save(run: Run) -> None:
    """Write a checkpoint."""
    config = run.config
    state = {"step": run.step_count, "config": settings(config), "length": length(config), "run": run.state()}
    if run.devices.is_first:
        save_checkpoint(checkpoints_of(config), state, keep=config.checkpoint.keep)


def folder_of(config: RunConfig) -> Path:
    """The folder of the run's record, which stays, and of its checkpoints: beside the bundle."""
    return config.out.with_name(config.out.name + ".run")


def checkpoints_of(config: RunConfig) -> Path:
    """The folder of the run's checkpoints, which is deleted when the bundle is written."""
    return folder_of(config) / "checkpoints"


def settings(config: RunConfig) -> dict[str, Any]:
    """The settings that must not change when a run resumes: all settings that affect its numbers, except its length."""
    places = {"data": {"path", "cache_dir"}, "optim": {"accumulate", "max_steps", "max_seconds"}}
    parts = {"seed", "dtype", "cache", "model", "data", "tokenizer", "optim"}
    return config.model_dump(mode="json", include=parts, exclude=places)


def length(config: RunConfig) -> dict[str, Any]:
    """The settings of the length of a run, which may change when it resumes."""
    return {"optim.max_steps": config.optim.max_steps, "optim.max_seconds": config.optim.max_seconds}


def valid_nats_per_bit(run: Run, dataset: Dataset) -> float:
    """Nats per token that equal one bit per byte on the part of the validation split that is used while training."""
    return dataset.nats_per_bit(dataset.valid[: run.config.eval.tokens])


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
