"""Continue a text in the terminal: `python -m allattn.generate`, or `allattn generate`.

The engine runs in this process with a single row; with --url the command sends the request to a server's POST /generate
instead. Both ways, equal seeds give equal texts.
"""

import json
import math
import os
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from http.client import HTTPException
from typing import BinaryIO, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from allattn.generate_flags import Asked, FlagError, in_flags, read_flags
from model.bundle import BundleError
from server.config import ConfigError, EngineOptions, Settings
from server.dialects.generate.schema import GenerateRequest, Parameters
from server.dialects.sampling import plan_generations
from server.engine.engine import Engine
from server.errors import InternalError, InvalidField, ServerError
from server.requests.output_text import OutputText
from server.requests.prompts import read_prompts
from server.served_model import open_model

ENOUGH = ("length", "eos_token", "stop_sequence")  # finish reasons of a complete text
INTERRUPTED, BROKEN_PIPE = 130, 141  # exit statuses that shells give for SIGINT and SIGPIPE
_SHOWN = {  # a visible sign for each control character, which a terminal would obey
    code: 0x2400 + code if code < 0x20 else 0xFFFD
    for code in range(0xA0)
    if unicodedata.category(chr(code)) == "Cc" and chr(code) not in "\n\t"
}


class AnswerError(Exception):
    """The server cannot be reached, refuses, breaks off, or is not an allattn server."""


class _StayHere(HTTPRedirectHandler):
    """A redirect handler that follows no redirect: another host must get neither the prompt nor the key."""

    def redirect_request(self, *_: object) -> None:
        """Return None, which urllib treats as an error."""


class Piece(NamedTuple):
    """The text that one token, or the end of the output, released."""

    text: str
    logprob: float | None  # log-probability of the token, nats; None for the end


class OutputStats:
    """Counts and times of the output, for the line of figures at the end."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.logprob_sum = 0.0
        self._first = self._last = 0.0

    def add(self, piece: Piece) -> None:
        """Count a piece that has just arrived."""
        if piece.logprob is None:
            return
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self.num_tokens += 1
        self.logprob_sum += piece.logprob

    def describe(self, parameters: Parameters) -> str:
        """Return the figures in one line."""
        drawn = "greedy" if parameters.is_greedy else f"seed {parameters.seed}"
        parts = [drawn, f"{self.num_tokens} token{'' if self.num_tokens == 1 else 's'}"]
        if self._last > self._first:
            parts.append(f"{(self.num_tokens - 1) / (self._last - self._first):.1f} tokens/s")
        if self.num_tokens:
            parts.append(f"{-self.logprob_sum / self.num_tokens / math.log(2):.3f} bits per token")
        return ", ".join(parts)


def main(argv: Sequence[str]) -> int:
    """Write the continuation to standard output as it arrives; return the exit status."""
    try:
        asked = read_flags(argv)
        return _write(_pieces(asked), parameters=asked.request.parameters, stats=asked.stats)
    except KeyboardInterrupt:  # before the first piece was written
        return INTERRUPTED
    except InvalidField as error:
        return _complain(in_flags(error), status=2)
    except (FlagError, ConfigError) as error:
        return _complain(str(error), status=2)
    except (BundleError, ServerError, AnswerError, ValueError) as error:
        return _complain(str(error), status=1)


def _pieces(asked: Asked) -> Iterator[Piece]:
    if asked.url is None:
        return generate_here(asked.request, asked.settings)
    keys = asked.settings.all_api_keys()
    return generate_there(asked.request, url=asked.url, key=keys[0].get_secret_value() if keys else None)


def generate_here(request: GenerateRequest, settings: Settings) -> Iterator[Piece]:
    """Yield the continuation from an engine in this process.

    Raises:
        BundleError, ConfigError, InvalidField: the model cannot be opened as the settings say or cannot read the text.
        InternalError: the model failed while it generated.
    """
    bundle, settings = open_model(settings)
    tokenizer = bundle.tokenizer
    prompts = read_prompts(request.inputs, field="inputs", tokenizer=tokenizer)
    [plan] = plan_generations(
        request.parameters, prompts=prompts, tokenizer=tokenizer, timeout_s=None, prompt_extras=None
    )
    engine = _load_engine(settings.model_copy(update={"num_rows": 1}))
    text = OutputText(tokenizer, stops=plan.stops, num_free=plan.sampling.min_new_tokens)
    engine.submit(plan.message(lambda: "terminal"))
    while engine.has_work and text.matched_stop is None:
        step = engine.step()
        for token in step.tokens:
            is_end = token.token in plan.sampling.end_ids
            yield Piece("" if is_end else text.add(token.token), token.logprob)
        if step.ended and (error := step.ended[0].error):
            raise InternalError(error)
    yield Piece(text.finish(), None)


def _load_engine(options: EngineOptions) -> Engine:
    from server.engine.runner import ModelRunner  # loads torch, which --help and --url do not need

    return Engine(ModelRunner.load(options), options)


def generate_there(request: GenerateRequest, *, url: str, key: str | None) -> Iterator[Piece]:
    """Yield the continuation from a server. Raises AnswerError."""
    body = request.model_dump(mode="json", exclude_unset=True)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    asked = Request(f"{url.rstrip('/')}/generate", json.dumps(body).encode(), headers)
    num_chars, details, line = 0, None, b""
    try:
        with build_opener(_StayHere).open(asked) as answer:
            for line in answer:
                if not line.startswith(b"data:"):
                    continue  # an empty line between events, or a ping
                event = json.loads(line.removeprefix(b"data:"))
                if "error" in event:
                    raise AnswerError(f"{url}: {event['error']['message']}")
                token, whole, details = event["token"], event["generated_text"], event["details"]
                text = token["text"] if whole is None else whole[num_chars:]
                num_chars += len(text)
                yield Piece(text, token["logprob"] if token else None)
    except HTTPError as error:
        raise AnswerError(f"{url}: {_reason(error)}") from error
    except URLError as error:
        raise AnswerError(f"{url} cannot be reached: {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise AnswerError(f"{url} broke off: {error}") from error
    except (LookupError, TypeError, ValueError) as error:
        raise AnswerError(f"{url} sent an unknown event: {line[:60]!r}") from error
    if details is None:
        raise AnswerError(f"{url} broke off")
    if details["finish_reason"] not in ENOUGH:
        raise AnswerError(f"{url} ended the text early: {details['finish_reason']}")


def _reason(error: HTTPError) -> str:
    """Return the server's message, or the HTTP status if the body is not an allattn error."""
    try:
        message: str = json.loads(error.read())["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return f"{error.code} {error.reason}"
    return message


def _write(pieces: Iterable[Piece], *, parameters: Parameters, stats: bool) -> int:
    """Write all pieces to standard output and the figures to standard error; return the exit status."""
    figures, out, is_terminal, text = OutputStats(), sys.stdout.buffer, sys.stdout.isatty(), ""
    try:
        for piece in pieces:
            figures.add(piece)
            text = piece.text or text
            _put(out, printable(piece.text) if is_terminal else piece.text)
        status = 0
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:  # the reader of the pipe has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout at its end
        return BROKEN_PIPE
    if is_terminal and not text.endswith("\n"):
        _put(out, "\n")
    if stats or sys.stderr.isatty():
        print(figures.describe(parameters), file=sys.stderr)
    return status


def _put(out: BinaryIO, text: str) -> None:
    if text:
        out.write(text.encode(errors="replace"))
        out.flush()


def printable(text: str) -> str:
    """Return the text with a visible sign for each control character except line ends and tabs."""
    return text.translate(_SHOWN)


def _complain(message: str, *, status: int) -> int:
    print(f"allattn: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
