"""The sources of the server's settings: a TOML file, environment variables and flags; a later source wins.

pydantic-settings is no help here: it accepts unknown variables, does not tell where a value came from, and repeats
the word after an unknown flag, which may be an API key.
"""

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from model.backends import OneOf
from server.config.settings import Settings

ENV_PREFIX = "ALLATTN_"
CONFIG_FLAG, CONFIG_ENV = "--config", ENV_PREFIX + "CONFIG"
PRINT_FLAG = "--print-config"
SECRET = "api_keys"  # has no flag, and its value is never shown
FIRST = ("bundle", "backend", "host", "port", "num_rows")  # the settings that most people change stand first in --help
NAMES = (*FIRST, *(name for name in Settings.model_fields if name not in FIRST))
EPILOG = f"""\
Each flag has a twin in the environment ({ENV_PREFIX}PORT for --port) and in the TOML file (port).
API keys can also be given in the environment ({ENV_PREFIX}API_KEYS, with commas between them) or in the
TOML file (api_keys, a list). There is no --api-keys: every user of a machine can read the arguments of
its processes.
"""


class ConfigError(ValueError):
    """A setting is unknown or cannot be used; one line says which, where it came from and what is allowed."""


def load_settings(argv: Sequence[str], *, environ: Mapping[str, str]) -> Settings:
    """Returns the settings from flags, environment variables and the TOML file that --config or ALLATTN_CONFIG names.

    Raises:
        ConfigError: an unknown flag, variable or key, a wrong type or value, or a file that cannot be read.
    """
    return _load(_flags(argv), environ=environ).settings


def wants_print_config(argv: Sequence[str]) -> bool:
    """Returns whether --print-config is among the flags. Raises ConfigError for an unknown one."""
    return PRINT_FLAG in _flags(argv)


def describe_settings(argv: Sequence[str], *, environ: Mapping[str, str]) -> str:
    """Returns the settings as TOML for --config, each line with the source of its value.

    The text tells the number of API keys and no key. Raises ConfigError as `load_settings` does.
    """
    loaded = _load(_flags(argv), environ=environ)
    return "".join(
        f"{_assignment(name, getattr(loaded.settings, name))}  # {_comment(loaded.origins.get(name, 'default'))}\n"
        for name in NAMES
    )


@dataclass(frozen=True)
class _Loaded:
    settings: Settings
    origins: Mapping[str, str]  # in words, for each setting that is not a default


def _flags(argv: Sequence[str]) -> dict[str, Any]:
    """Returns the values on the command line by setting; --config and --print-config keep their spelling as keys."""
    found, unknown = _parser().parse_known_args(argv)
    if unknown:
        # a value is not repeated, it may be a key
        name = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
        if name == _flag(SECRET):
            raise ConfigError(
                f"{name} would show the keys to every user; use {_flag('api_key_file')} or {_env(SECRET)}"
            )
        raise ConfigError(f"{name} is not a flag; there are: {', '.join(_flag_names())}")
    return {name: value for name, value in vars(found).items() if value is not None}


def _load(flags: Mapping[str, Any], *, environ: Mapping[str, str]) -> _Loaded:
    variables = {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX) and name != CONFIG_ENV
    }
    settings = {name: value for name, value in flags.items() if name not in (CONFIG_FLAG, PRINT_FLAG)}
    path = flags.get(CONFIG_FLAG) or environ.get(CONFIG_ENV)
    keys = _read_toml(Path(path)) if path else {}
    origins = {
        **{key: f"{path}: {key}" for key in keys},
        **{name: _env(name) for name in variables},
        **{name: _flag(name) for name in settings},
    }
    try:
        return _Loaded(Settings.model_validate({**keys, **variables, **settings}), origins=origins)
    except ValidationError as error:
        raise ConfigError(_one_line(error, origins=origins)) from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _env(name: str) -> str:
    return ENV_PREFIX + name.upper()


def _flag_names() -> list[str]:
    return [*(_flag(name) for name in NAMES if name != SECRET), CONFIG_FLAG, PRINT_FLAG, "--help"]


def _one_line(error: ValidationError, *, origins: Mapping[str, str]) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"{origins[name]} is not a setting; there are: {', '.join(NAMES)}"
    value = "" if name == SECRET else f" = {first['input']!r}"
    return f"{origins[name]}{value}: {first['msg'].removeprefix('Value error, ')}"


def _assignment(name: str, value: Any) -> str:
    """Returns a line of TOML, or a comment if the value is not set or is secret."""
    if name == SECRET:
        return f"# {name}: {len(value)}, not shown" if value else f"# {name} is not set"
    if value is None:
        return f"# {name} is not set"
    if isinstance(value, bool):
        return f"{name} = {str(value).lower()}"
    if isinstance(value, int | float):
        return f"{name} = {value!r}"
    # TOML has the escapes of JSON, and wants one more character escaped
    return f"{name} = {json.dumps(str(value), ensure_ascii=False)}".replace("\x7f", "\\u007f")


def _comment(text: str) -> str:
    """Returns the text on one line: the name of a file may hold any character."""
    return "".join(char if char.isprintable() else "?" for char in text)


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
    """Returns a parser with one flag for each setting. Values stay texts: `Settings` alone knows types and ranges."""
    parser = _Parser(
        prog=sys.argv[0] if sys.argv[0].startswith("allattn ") else "python -m server",
        description="Serve the model of a bundle over HTTP.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        CONFIG_FLAG, dest=CONFIG_FLAG, metavar="FILE", help=f"TOML file with settings; also {CONFIG_ENV}"
    )
    parser.add_argument(
        PRINT_FLAG,
        dest=PRINT_FLAG,
        action="store_const",
        const=True,
        help=f"print the settings in effect, as a file for {CONFIG_FLAG}, and end",
    )
    for name in NAMES:
        field = Settings.model_fields[name]
        if name != SECRET:
            default = {"None": "not set", "True": "true", "False": "false"}.get(str(field.default), field.default)
            parser.add_argument(_flag(name), metavar=_metavar(name, field), help=f"{field.description} [{default}]")
    return parser


def _metavar(name: str, field: FieldInfo) -> str:
    if choices := [choice for rule in field.metadata if isinstance(rule, OneOf) for choice in rule.names()]:
        return "|".join(choices)
    if get_origin(field.annotation) is Literal:
        return "|".join(get_args(field.annotation))
    if name.endswith(("_s", "_ms")):
        return "SECONDS" if name.endswith("_s") else "MILLISECONDS"
    kinds: dict[Any, str] = {int: "N", int | None: "N", bool: "true|false", Path: "DIR", Path | None: "FILE"}
    return kinds.get(field.annotation, "TEXT")
