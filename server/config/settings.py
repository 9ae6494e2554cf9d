"""The server's settings: the one place where each is declared, with its default and range.

Knows neither flags nor files; those are in sources.py.
"""

from pathlib import Path

from pydantic import Field, SecretStr, field_validator

from server.config.engine_options import EngineOptions
from server.config.keys import check_keys, read_key_file, split_keys


class Settings(EngineOptions):
    """All settings of `python -m server`."""

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    max_waiting: int = Field(default=256, ge=0, description="sequences that may wait for a row; more are refused (429)")
    max_waiting_tokens: int = Field(
        default=8 << 20, ge=1, description="prompt tokens that may wait to be read; more are refused (429)"
    )
    max_body_bytes: int = Field(
        default=32 << 20, ge=1, description="largest request body; larger ones are refused (413)"
    )
    max_behind: int = Field(
        default=4096, ge=1, description="events a client may leave unread; a slower reader is cut off, its row freed"
    )
    timeout_s: float | None = Field(
        default=None, gt=0, description="seconds for a request that names no timeout_s; no limit if not set"
    )
    heartbeat_timeout_s: float = Field(
        default=5, gt=0, description="silence of the engine, while work is pending, that counts as a hang"
    )
    max_restarts: int = Field(
        default=3, ge=0, description="restarts of the engine within restart_window_s; one failure more ends the server"
    )
    restart_window_s: float = Field(default=600, gt=0, description="seconds that a restart counts")
    shutdown_timeout_s: float = Field(default=25, ge=0, description="seconds that live work may take after SIGTERM")
    api_keys: tuple[SecretStr, ...] = Field(
        default=(), description="keys, one of which a client has to send; nobody is asked for one if there are none"
    )
    api_key_file: Path | None = Field(
        default=None, description="file of more API keys, one a line; # begins a comment line"
    )

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split(cls, given: object) -> object:
        return split_keys(given) if isinstance(given, str) else given

    @field_validator("api_keys")
    @classmethod
    def _check(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        check_keys(keys)
        return keys

    @field_validator("api_key_file")
    @classmethod
    def _try(cls, path: Path | None) -> Path | None:
        if path is not None:
            read_key_file(path)
        return path

    def all_api_keys(self) -> tuple[SecretStr, ...]:
        """The keys of api_keys and of api_key_file. Raises ValueError if the file has become unusable."""
        return self.api_keys + (read_key_file(self.api_key_file) if self.api_key_file else ())
