"""Who may ask (API keys), and what a browser may do with an answer (headers). Knows no endpoint but the open ones."""

import hashlib
import hmac
from collections.abc import Callable, Iterable

from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ServerError, Unauthorized

OPEN_PATHS = frozenset({"/health/live", "/healthz"})  # an orchestrator's probe has no key, and learns nothing there
OPEN_PAGE = "/"  # the playground has to be there to ask for the key; it and its files are the same for everybody
OPEN_FOLDER = "/playground/"
PAGE_POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"

Answer = Callable[[Request, ServerError], Response]


class BearerAuth:
    """Lets a request pass that has one of `keys` as `Authorization: Bearer KEY`, and refuses others, unread."""

    def __init__(self, app: ASGIApp, *, keys: Iterable[SecretStr], refuse: Answer) -> None:
        self._app = app
        self._digests = [_digest(key.get_secret_value()) for key in keys]
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] == "lifespan" or _is_open(scope) or self._knows(Headers(scope=scope).get("authorization", "")):
            await self._app(scope, receive, send)
            return
        response = self._refuse(Request(scope), Unauthorized("send an API key, as Authorization: Bearer KEY"))
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _knows(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        # all of them are compared, so that the time does not tell which one is close
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _is_open(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    path: str = scope["path"]
    return path in OPEN_PATHS or path == OPEN_PAGE or path.startswith(OPEN_FOLDER)


def _digest(key: str) -> bytes:
    """Of one length for all keys, since the time of a comparison tells the length."""
    return hashlib.sha256(key.encode()).digest()


def add_security_headers(headers: MutableHeaders) -> None:
    """Before an answer is sent: nothing is sniffed; a page is not framed, tells nobody, and loads only what is ours.

    A page that needs something else has a Content-Security-Policy of its own, which stays.
    """
    headers["X-Content-Type-Options"] = "nosniff"
    if headers.get("content-type", "").startswith("text/html"):
        headers.setdefault("Content-Security-Policy", PAGE_POLICY)
        headers["Referrer-Policy"] = "no-referrer"
        headers["X-Frame-Options"] = "DENY"
