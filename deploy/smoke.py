"""Check, in the running container, that the server answers and can write no file; docker-check.sh runs this."""

import json
import os
import tempfile
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

BODY = {"inputs": "It was a dark", "parameters": {"max_new_tokens": 16, "details": True}}


def ask(path: str, body: object = None) -> Any:
    """Return the JSON of the server's answer; fail unless its status is 200."""
    connection = HTTPConnection("127.0.0.1", 8000, timeout=60)
    connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
    response = connection.getresponse()
    text = response.read().decode()
    assert response.status == 200, f"{path}: {response.status} {text}"
    return json.loads(text)


def can_write(folder: Path) -> bool:
    """Return whether this process can create a file in the folder."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


health = ask("/health")
assert health["state"] == "ready", health
server = Path(f"/proc/{health['engine']['pid']}/status").read_text().split("PPid:")[1].split()[0]
assert server == "1", f"the server is process {server}: signals for the container would not reach it"
assert os.getuid() != 0, "the image runs as root"
writable = [str(folder) for folder in (Path("/app"), Path("/opt/venv"), Path("/")) if can_write(folder)]
assert not writable, f"files can be written in {writable}"
answer = ask("/generate", BODY)
assert answer["details"]["generated_tokens"] == 16, answer
info = ask("/info")
assert info["version"][0].isdigit(), f"the image does not know its version: {info['version']}"
said = {"version": info["version"], "device": info["engine"]["device"], "text": answer["generated_text"]}
print(json.dumps({"uid": os.getuid(), **said}))
