"""docs/openapi.json and docs/api.md, as the application describes itself: `python -m server.reference [DIR]`.

Both are made of the OpenAPI document alone, and a test fails where they are not what this writes.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from model.bundle import Bundle
from model.config import ModelConfig
from model.tokenizer import BytesTokenizer
from server.app import create_app
from server.config import Settings
from server.link.supervisor import EngineLink
from server.web.auth import OPEN_PAGE, OPEN_PATHS

Schema = Mapping[str, Any]

COMMAND = "python -m server.reference"
DOCS = Path("docs")
KINDS = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "array": "list",
    "null": "null",
}
HEAD = f"""\
# API

Made by `{COMMAND}` from [openapi.json](openapi.json), which a running server has at `/openapi.json`, with every
status code and an example of each; `/docs` shows it.

JSON over HTTP/1.1. A field that is not in these tables is refused, and so are fields that contradict each other:
nothing that is accepted is ignored. With API keys, all but {", ".join(f"`{path}`" for path in sorted(OPEN_PATHS))}
and the page at `{OPEN_PAGE}` want the header `Authorization: Bearer KEY`. A request's id comes from `X-Request-Id`,
else from `traceparent`, and stands in the answer's `X-Request-Id`.

Every error has one body, `{{"error": {{"message", "type", "param", "code"}}, "error_type", "request_id"}}`, which the
clients of OpenAI, text-generation-inference and Hugging Face can read. 429 and 503 come with `Retry-After` and
`retry-after-ms`. A stream is `text/event-stream`: it is validated and admitted before its headers are sent, so its
status is real; what fails later is one last event that holds the error.
"""


def main(argv: Sequence[str]) -> int:
    """Write both files into a folder, docs/ if none is named; returns the exit status."""
    folder = Path(argv[0]) if argv else DOCS
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return 0


def files() -> dict[str, str]:
    """The text of each file, by its name."""
    document = describe_app()
    return {"openapi.json": json.dumps(document, indent=1, ensure_ascii=False) + "\n", "api.md": as_markdown(document)}


def describe_app() -> dict[str, Any]:
    """The OpenAPI document of a server with default settings, whatever the model."""
    config = ModelConfig(vocab_size=256, num_layers=1, width=8, num_heads=2, num_persistent=4, max_span=16)
    bundle = Bundle(Path("bundle"), config, BytesTokenizer(), card="", training={}, hash="")
    settings = Settings()
    return create_app(settings=settings, bundle=bundle, link=EngineLink(settings)).openapi()


def as_markdown(document: Schema) -> str:
    """The document for readers."""
    operations = [
        (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    contents = [f"| [{name}](#{_anchor(name)}) | {operation['summary']} |" for name, operation in operations]
    parts = [HEAD, "| endpoint | |", "|---|---|", *contents]
    seen: dict[str, str] = {}  # bodies, and where they are described
    for name, operation in operations:
        parts += ["", f"## {name}", "", operation["summary"] + "."]
        body = json.dumps(operation.get("requestBody", name))
        if body in seen:
            parts += ["", f"Fields, answers and errors are those of [{seen[body]}](#{_anchor(seen[body])})."]
        else:
            parts += [*_request(name, operation, document), *_answers(operation)]
        seen.setdefault(body, name)
    return "\n".join(parts) + "\n"


def _anchor(heading: str) -> str:
    """As GitHub makes them."""
    kept = "".join(char for char in heading.lower() if char.isalnum() or char in " -_")
    return kept.replace(" ", "-")


def _request(name: str, operation: Schema, document: Schema) -> Iterator[str]:
    """Tables of the fields of the body, and an example to paste."""
    if "requestBody" not in operation:
        return
    content = operation["requestBody"]["content"]["application/json"]
    todo = [("", _resolved(content["schema"], document))]
    while todo:
        title, schema = todo.pop(0)
        if title:
            yield from ("", f"Fields of `{title}`: " + schema.get("description", "").replace("\n\n", " "))
        yield from ("", "| field | value | default | |", "|---|---|---|---|")
        required = schema.get("required", ())
        for field, inner in sorted(schema["properties"].items(), key=lambda entry: entry[0] not in required):
            resolved = _resolved(inner, document)
            if "properties" in resolved:
                todo.append((field, resolved))
            is_required = field in required
            default = "" if is_required or "properties" in resolved else f"`{json.dumps(inner.get('default'))}`"
            about = [*(["required"] if is_required else []), *filter(None, [inner.get("description")])]
            yield f"| `{field}` | {_values(resolved)} | {default} | {'; '.join(about).replace('|', chr(92) + '|')} |"
    for example in content["examples"].values():
        path, body = name.partition(" ")[2], json.dumps(example["value"], ensure_ascii=False)
        quoted = body.replace("'", "'\\''")
        yield from ("", "```sh", f"curl -N http://127.0.0.1:8000{path} -d '{quoted}'", "```")
        return


def _answers(operation: Schema) -> Iterator[str]:
    """The good answer by example, and the codes of all errors."""
    for kind, content in operation["responses"]["200"].get("content", {}).items():
        example = content.get("example")
        if example is None:
            continue
        if isinstance(example, str):
            yield from ("", f"`{kind}`:", "", "```", example.strip(), "```")
        else:
            lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in example.items()]
            yield from ("", f"`{kind}`:", "", "```json", "{", ",\n".join(lines), "}", "```")
    codes = [
        f"{status} {' or '.join(f'`{code}`' for code in content['examples'])}"
        for status, answer in sorted(operation["responses"].items())
        if "examples" in (content := answer.get("content", {}).get("application/json", {}))
    ]
    if codes:
        yield from ("", f"Errors: {', '.join(codes)}.")


def _resolved(schema: Schema, document: Schema) -> Schema:
    """What a reference refers to, an optional one too; the schema itself where it is none."""
    some = [one for one in (schema, *schema.get("anyOf", ())) if "$ref" in one]
    return document["components"]["schemas"][some[0]["$ref"].rpartition("/")[2]] if some else schema


def _values(schema: Schema) -> str:
    """What may stand there, in words."""
    if "properties" in schema:
        return "object, see below"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{json.dumps(one)}`" for one in schema.get("enum", [schema.get("const")]))
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return ", or ".join(dict.fromkeys(_values(one) for one in schema[key]))
    kind = KINDS.get(schema.get("type", ""), "object")
    if kind == "list":
        limits = _limits(schema, low="minItems", high="maxItems")
        return f"list{f' of {limits}' if limits else ''} ({_values(schema['items'])})"
    if kind == "text":
        limits = _limits(schema, low="minLength", high="maxLength")
        return "text, not empty" if limits == "at least 1" else f"text, {limits} characters" if limits else kind
    limits = _limits(schema, low="minimum", high="maximum")
    return f"{kind}, {limits}" if limits else kind


def _limits(schema: Schema, *, low: str, high: str) -> str:
    """`1 to 8`, `more than 0 and at most 1`, `at least 1`, or nothing."""
    above, least, most = schema.get("exclusiveMinimum"), schema.get(low), schema.get(high)
    if least is not None and most is not None:
        return f"{least} to {most}"
    words = (("more than", above), ("at least", least), ("at most", most))
    return " and ".join(f"{word} {value}" for word, value in words if value is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
