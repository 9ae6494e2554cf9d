"""The configuration of a training run: read from a TOML file and flags, checked when it is made, and frozen."""

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from model.config import ModelShape

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.toml"


class ConfigError(ValueError):
    """A setting that is unknown or has a wrong value; the message has its name, its value and what is allowed."""


class Section(BaseModel):
    """A section of the configuration: frozen; rejects unknown keys and infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(Section):
    """The corpus, and the size of batches."""

    name: str = Field(
        default="", description="shakespeare, classics8, enwik8, text8, wikitext103, or empty with a path"
    )
    path: Path | None = Field(
        default=None, description="the corpus: a file, or a folder of train.txt, valid.txt, test.txt"
    )
    batch: int = Field(ge=1, description="streams that are read side by side, on all devices together")
    block: int = Field(ge=1, description="tokens of each stream that a step learns from")
    reset_prob: float = Field(
        default=0.0, ge=0, le=1, description="chance that a stream forgets its past before a block"
    )
    cache_dir: Path = Field(default=Path(".cache/allattn"), description="where tokenizers and encoded corpora are kept")


class TokenizerConfig(Section):
    """The tokenizer."""

    kind: Literal["bytes", "bpe", "word"] = Field(default="bytes", description="what a token is")
    vocab_size: int | None = Field(default=None, ge=2, description="bpe: needed; word: the most frequent, empty = all")

    @model_validator(mode="after")
    def _size_fits_kind(self) -> Self:
        if self.kind == "bpe" and self.vocab_size is None:
            raise ValueError("vocab_size is missing; kind = 'bpe' needs it, for example 4096")
        if self.kind == "bytes" and self.vocab_size is not None:
            raise ValueError(f"vocab_size = {self.vocab_size} is for 'bpe' and 'word'; kind = 'bytes' always has 256")
        return self


class OptimConfig(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adagrad", "muon"] = Field(
        default="adamw", description="adagrad is the paper's for characters; muon = Muon on matrices, AdamW on the rest"
    )
    lr: float = Field(gt=0, description="peak learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), description="adamw: decay of the two moments"
    )
    momentum: float = Field(default=0.95, ge=0, lt=1, description="muon: of the gradient that is orthogonalised")
    eps: float = Field(default=1e-8, gt=0, description="adamw: added to the root of the second moment")
    weight_decay: float = Field(default=0.0, ge=0, description="on matrices only")
    grad_clip: float = Field(
        default=1.0, ge=0, description="adamw, muon: global norm; adagrad: norm of each parameter; 0 = off"
    )
    accumulate: int = Field(
        default=1, ge=1, description="parts of a batch that are computed one after another, to save memory"
    )
    warmup_steps: int = Field(default=0, ge=0, description="linear warm-up")
    schedule: Literal["constant", "cosine", "trapezoid", "step"] = Field(
        default="constant", description="how lr falls after the warm-up; step = at once, as in the paper"
    )
    decay_fraction: float = Field(
        default=0.2, gt=0, le=1, description="trapezoid: the last share of the run, in which lr falls; step: is low"
    )
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1, description="lr at the end, as a share of the peak")
    span_penalty: float = Field(
        default=0.0, ge=0, description="times L times the mean z of the heads, summed over layers"
    )
    max_steps: int = Field(ge=1, description="updates of the whole run")
    max_seconds: float | None = Field(
        default=None, gt=0, description="end the schedule earlier, after so long in steps"
    )


class EvalConfig(Section):
    """The validation during training."""

    every_steps: int = Field(default=500, ge=1, description="steps between two validations")
    tokens: int = Field(default=100_000, ge=1, description="tokens of the validation split for each validation")


class CheckpointConfig(Section):
    """The checkpoints of a run, which are saved beside the bundle."""

    every_seconds: float = Field(default=300.0, gt=0, description="wall time between two checkpoints")
    keep: int = Field(default=2, ge=1, description="how many checkpoints stay")


class RunConfig(BaseSettings):
    """Train an all-attention language model."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", cli_avoid_json=True, nested_model_default_partial_update=True
    )

    out: Path = Field(
        description="the bundle to write; OUT.run keeps the record, and checkpoints until the bundle is written"
    )
    seed: int = Field(default=1, ge=0, description="of weights, dropout and stream resets")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16 = matrix products under autocast"
    )
    num_threads: int | None = Field(default=None, ge=1, description="CPU threads; empty = as many as cores")
    compile: bool = Field(default=False, description="torch.compile the layers")
    checkpoint_activations: bool = Field(
        default=False, description="recompute the activations of each layer in the backward pass, to save memory"
    )
    cache: Literal["inputs", "keys"] = Field(
        default="inputs",
        description="inputs = keep each layer's inputs of earlier blocks and compute keys and values from them again; "
        "keys = keep the keys and values: faster, in twice the memory, without a gradient from later blocks",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="under torchrun: whole copies, or weights and optimizer cut in parts (FSDP2)"
    )
    notes: Path | None = Field(default=None, description="Markdown file that the bundle's README includes")
    model: ModelShape
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    optim: OptimConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the signature is pydantic's
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only the TOML file and the flags, because a run must not depend on environment variables."""
        return (init_settings,)


def load_config(argv: Sequence[str]) -> RunConfig:
    """The configuration that `[CONFIG.toml] [--section.key value ...]` describes; the default file is the quickstart.

    Raises:
        ConfigError: the file cannot be read, or a key or value in the file or in the flags is wrong.
    """
    flags = list(argv)
    program = sys.argv[0] if sys.argv[0].startswith("allattn ") else "python -m training.run"
    path = QUICKSTART if not flags or flags[0].startswith("-") else Path(flags.pop(0))
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    try:
        source = CliSettingsSource[object](
            RunConfig, cli_parse_args=flags, cli_exit_on_error=False, cli_prog_name=f"{program} [CONFIG.toml]"
        )
        return RunConfig(_cli_settings_source=source, **table)  # type: ignore[call-arg]
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from error
    except SettingsError as error:
        raise ConfigError(f"{error}; --help lists the flags") from error


def _explain(problem: ErrorDetails) -> str:
    """The message for an error that pydantic found: `section.key = value: what is allowed`."""
    key = ".".join(map(str, problem["loc"])) or "configuration"
    match problem["type"]:
        case "extra_forbidden":
            allowed = ", ".join(_section(problem["loc"][:-1]).model_fields)
            return f"{key} = {problem['input']!r} is not a setting; allowed here: {allowed}"
        case "missing":
            return f"{key} is missing"
        case "value_error":  # fields of a section that contradict each other: the text names them and their values
            return f"{key}: {problem['ctx']['error']}"
        case _:
            return f"{key} = {problem['input']!r}: {problem['msg']}"


def _section(names: tuple[int | str, ...]) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    for name in names:
        annotation = section.model_fields[str(name)].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        section = annotation
    return section
