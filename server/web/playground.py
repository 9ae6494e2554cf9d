"""GET / and the files of the playground, a page that knows this server by its API only. Knows no model.

The files are read once. A browser keeps them, and asks by their ETag whether they are still the same.
"""

import hashlib
from pathlib import Path

from fastapi import Request, Response

from server.requests.service import Service
from server.web.endpoint import Endpoint, Handler

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def _endpoint(path: Path) -> Endpoint:
    content = path.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache"}

    def make(_service: Service) -> Handler:
        async def file(request: Request) -> Response:
            if etag in request.headers.get("if-none-match", ""):
                return Response(status_code=304, headers=headers)
            return Response(content, media_type=MEDIA_TYPES[path.suffix], headers=headers)

        return file

    url = "/" if path.name == INDEX else f"/playground/{path.name}"
    return Endpoint(method="GET", path=url, make=make, in_schema=False)


ENDPOINTS = tuple(_endpoint(path) for path in sorted(FOLDER.iterdir()) if path.suffix in MEDIA_TYPES)
