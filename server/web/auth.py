"""Access control: API keys for requests, security headers for responses. Knows no endpoint but the open ones."""

import hashlib
import hmac
from collections.abc import Callable, Iterable

from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ServerError, Unauthorized

OPEN_PATHS = frozenset({"/health/live", "/healthz"})  # an orchestrator's probe has no key; the response reveals nothing
OPEN_PAGE = "/"  # the playground asks for the key itself; its files are the same for every user
OPEN_FOLDER = "/playground/"
PAGE_POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"

ErrorResponder = Callable[[Request, ServerError], Response]


class BearerAuth:
    """Middleware that refuses, unread, each request without one of `keys` as `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, *, keys: Iterable[SecretStr], refuse: ErrorResponder) -> None:
        self._app = app
        self._digests = [_digest(key.get_secret_value()) for key in keys]
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "lifespan" or _is_open(scope) or self._knows(Headers(scope=scope).get("authorization", "")):
            await self._app(scope, receive, send)
            return
        response = self._refuse(Request(scope), Unauthorized("send an API key, as Authorization: Bearer KEY"))
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _knows(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        # compare all keys, so that the time does not reveal which key is close
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _is_open(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    path: str = scope["path"]
    return path in OPEN_PATHS or path == OPEN_PAGE or path.startswith(OPEN_FOLDER)


def _digest(key: str) -> bytes:
    """Return a hash, of the same length for all keys: the time of a comparison would reveal a key's length."""
    return hashlib.sha256(key.encode()).digest()


def add_security_headers(headers: MutableHeaders) -> None:
    """Forbid a browser to guess content types, and a page to be framed, send referrers or load files of other sites.

    A Content-Security-Policy that the response already has stays.
    """
    headers["X-Content-Type-Options"] = "nosniff"
    if headers.get("content-type", "").startswith("text/html"):
        headers.setdefault("Content-Security-Policy", PAGE_POLICY)
        headers["Referrer-Policy"] = "no-referrer"
        headers["X-Frame-Options"] = "DENY"
