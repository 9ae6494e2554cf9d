"""The command line of `allattn generate`: flags become a request for POST /generate and the settings of a model.

Numbers stay strings here; `Parameters` and `Settings` check their types and ranges.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.backends import LoadOptions
from server.config import Settings, load_settings
from server.dialects.generate.schema import ONE_TEXT_FIELDS, GenerateRequest, Parameters
from server.errors import InvalidField
from server.web.body import parse


def _flagged(*types: object) -> tuple[str, ...]:
    """Return the names of the parameters that have one of these types."""
    return tuple(name for name in ONE_TEXT_FIELDS if Parameters.model_fields[name].annotation in types)


NUMBERS = _flagged(int, float, int | None, float | None)
SWITCHES = _flagged(bool, bool | None)
# settings that apply to a model in this process
HERE = ("bundle", *(name for name in LoadOptions.model_fields if name != "backend"))
KEY_FILE = "api_key_file"  # the one setting that applies with --url
METAVARS = {"bundle": "DIR", "num_threads": "N", KEY_FILE: "FILE"}
HELP = {  # help texts that replace descriptions written for the server
    KEY_FILE: "file with one API key per line; the first key is sent to the server",
    "max_new_tokens": "none = until something else ends the output [128]",
    "do_sample": "sample at temperature 1 unless --temperature is given",
    "seed": "of the random draws; --stats shows it at the end",
}
PROG = "python -m allattn.generate"
EPILOG = """\
Without PROMPT the command reads standard input and drops a line end at its end. It picks the most
probable token (greedy) unless a sampling flag or --do-sample is given. ALLATTN_* variables apply as they do for the
server; with --url the command sends the first key of ALLATTN_API_KEYS or --api-key-file.
"""


class FlagError(ValueError):
    """A flag or the prompt cannot be used; the message names the flag and what is allowed."""


@dataclass(frozen=True)
class Asked:
    """The command line as a request and settings."""

    request: GenerateRequest  # always has a seed
    settings: Settings
    url: str | None  # of a server; None = a model in this process
    stats: bool  # print the figures even if standard error is not a terminal


def read_flags(argv: Sequence[str]) -> Asked:
    """Read the command line, and standard input if the command line has no prompt. --help ends the process.

    Raises:
        FlagError: a flag or the prompt cannot be used.
        ConfigError: an ALLATTN_* variable cannot be used.
    """
    given = _parser().parse_args(argv)
    settings = _settings(given)
    try:
        request = _request(given)
    except InvalidField as error:
        raise FlagError(in_flags(error)) from error
    return Asked(request, settings, url=given.url, stats=given.stats)


def in_flags(error: InvalidField) -> str:
    """Return the error's message with the name of the flag in place of the field's name."""
    name = (error.param or "").removeprefix("parameters.")
    return str(error).replace(error.param or "", "PROMPT" if name == "inputs" else _flag(name), 1)


def _request(given: argparse.Namespace) -> GenerateRequest:
    asked = {name: _value(text) for name in NUMBERS if (text := getattr(given, name)) is not None}
    asked |= {name: True for name in SWITCHES if getattr(given, name)}
    asked |= {"stop": given.stop} if given.stop else {}
    asked.setdefault("seed", Parameters().draw_seed())
    prompt = _read_prompt() if given.prompt is None else given.prompt
    body = {"inputs": prompt, "parameters": asked, "stream": True}
    return parse(json.dumps(body).encode(), model=GenerateRequest)


def _value(text: str) -> object:
    """Return the value that the text spells in JSON, or the text itself if it is not JSON."""
    if text == "none":
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read_prompt() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise FlagError("PROMPT is missing; give one, or a text on standard input")
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise FlagError(f"standard input is not UTF-8 at byte {error.start}") from error


def _settings(given: argparse.Namespace) -> Settings:
    """Return the server's settings; a few of them have flags here."""
    set_here = {name: value for name in (*HERE, KEY_FILE) if (value := getattr(given, name)) is not None}
    if given.url is None and KEY_FILE in set_here:
        raise FlagError(f"{_flag(KEY_FILE)} is for a server; give its --url, or leave it out")
    for name in HERE:
        if given.url is not None and name in set_here:
            raise FlagError(f"{_flag(name)} is for a model in this process, --url for one in a server; leave one out")
    if given.url is not None and not given.url.startswith(("http://", "https://")):
        raise FlagError(f"--url: {given.url!r} is not allowed; it should begin with http:// or https://")
    return load_settings([f"{_flag(name)}={value}" for name, value in set_here.items()], environ=os.environ)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=sys.argv[0] if sys.argv[0].startswith("allattn ") else PROG,
        description="Continue a text in the terminal, with a model in this process or in a server.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue")
    parser.add_argument("--url", metavar="URL", help="of a server to ask, in place of a model in this process")
    for name in (*HERE, KEY_FILE):
        parser.add_argument(
            _flag(name), metavar=METAVARS.get(name, name.upper()), help=_help(Settings.model_fields, name)
        )
    for name in NUMBERS:
        parser.add_argument(_flag(name), metavar="N", help=_help(Parameters.model_fields, name))
    parser.add_argument("--stop", action="append", metavar="TEXT", help="ends the output; may be given several times")
    for name in SWITCHES:
        parser.add_argument(_flag(name), action="store_true", help=_help(Parameters.model_fields, name))
    parser.add_argument("--stats", action="store_true", help="tell seed, tokens/s and bits per token at the end")
    return parser


def _help(fields: Mapping[str, Any], name: str) -> str:
    """Return the help of a setting or parameter, made of its description and default."""
    if name in HELP:
        return HELP[name]
    default, text = fields[name].default, fields[name].description
    return text if default in (None, False) or " = off" in text else f"{text} [{default}]"
