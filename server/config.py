"""The server's settings: one frozen object, filled from a TOML file, the environment and flags; the later ones win.

Knows no default of a request; those are in schemas.py.
"""

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

ENV_PREFIX = "ALLATTN_"
CONFIG_FLAG, CONFIG_ENV = "--config", ENV_PREFIX + "CONFIG"


class ConfigError(ValueError):
    """A setting is unknown or cannot be used; one line says which, where it came from and what is allowed."""


class Settings(BaseModel):
    """Everything one can say to `python -m server`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: Path = Field(default=Path("bundles/default"), description="directory of the model to serve")
    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    num_rows: int = Field(default=32, ge=1, description="sequences that are computed at the same time")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="number format of weights and state")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes a GPU where there is one")
    num_threads: int | None = Field(
        default=None, ge=1, description="CPU threads of the engine; as torch chooses if not set"
    )
    chunk_tokens: int = Field(default=256, ge=1, description="most prompt tokens one row reads in a step")
    budget_tokens: int = Field(default=1024, ge=1, description="most prompt tokens all rows read in a step")
    max_waiting: int = Field(default=256, ge=0, description="sequences that may wait for a row; more are refused (429)")
    max_body_bytes: int = Field(
        default=32 << 20, ge=1, description="largest request body; larger ones are refused (413)"
    )
    shutdown_timeout_s: float = Field(default=30, ge=0, description="seconds that live work may take after SIGTERM")


def load_settings(argv: Sequence[str], *, environ: Mapping[str, str]) -> Settings:
    """Settings from flags, else environment variables, else the TOML file that --config or ALLATTN_CONFIG names.

    Raises:
        ConfigError: an unknown flag, variable or key, a wrong type or value, or a file that cannot be read.
    """
    flags = {name: value for name, value in vars(_parser().parse_args(argv)).items() if value is not None}
    variables = {
        name.removeprefix(ENV_PREFIX).lower(): value for name, value in environ.items() if name.startswith(ENV_PREFIX)
    }
    path = flags.pop("config", None) or variables.get("config")
    variables.pop("config", None)
    keys = _read_toml(Path(path)) if path else {}
    origins = {
        **{key: f"{path}: {key}" for key in keys},
        **{name: ENV_PREFIX + name.upper() for name in variables},
        **{name: _flag(name) for name in flags},
    }
    try:
        return Settings.model_validate({**keys, **variables, **flags})
    except ValidationError as error:
        raise ConfigError(_one_line(error, origins=origins)) from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _one_line(error: ValidationError, *, origins: Mapping[str, str]) -> str:
    first = error.errors()[0]
    origin = origins[str(first["loc"][0])]
    if first["type"] == "extra_forbidden":
        return f"{origin} is not a setting; there are: {', '.join(Settings.model_fields)}"
    return f"{origin} = {first['input']!r}: {first['msg']}"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # not TOML, or not text
        raise ConfigError(f"{path}: {error}") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists every flag)")


def _parser() -> argparse.ArgumentParser:
    """One flag per setting, all of them texts; `Settings` alone knows types and ranges."""
    parser = _Parser(
        prog="python -m server",
        description="Serve the model of a bundle over HTTP.",
        epilog=f"Each flag has a twin in the environment ({ENV_PREFIX}PORT for --port) and in the TOML file (port).",
        allow_abbrev=False,
    )
    parser.add_argument(CONFIG_FLAG, metavar="FILE", help=f"TOML file with settings; also {CONFIG_ENV}")
    for name, field in Settings.model_fields.items():
        parser.add_argument(
            _flag(name), metavar=_metavar(field.annotation), help=f"{field.description} [{field.default}]"
        )
    return parser


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    return {int: "N", int | None: "N", float: "SECONDS", Path: "DIR"}.get(annotation, "TEXT")
