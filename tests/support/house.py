"""The structure of the code: the room of every module of the project, and what each room may import.

tests/test_architecture.py fails if a module is new, moved or gone, until this table is changed too.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """A folder or a part of it: its modules, and the rooms and foreign packages that they may import."""

    modules: str
    rooms: str = ""
    packages: str = ""


# Ordered from the lowest layer up: a room may import only the rooms that it names, which stand above it in this table.
HOUSE = {
    "model": Room(
        "config tokenizer bundle backends artefact folder scoring attention spans cross_entropy adaptive",
        packages="numpy pydantic pydantic_core safetensors tokenizers torch tqdm",
    ),
    "model.network": Room("network layer tiled", "model", "torch"),
    "model.sampling": Room("params draw filters penalties", packages="numpy torch"),
    "model.frozen": Room(
        "loading baked cache served exported torch_graphs onnx_graphs",
        "model model.network model.sampling",
        "numpy onnxruntime torch",
    ),
    "model.frozen.native": Room("build library folding cache lm", "model model.frozen", "numpy torch"),
    "training": Room(
        "run loop data corpus download sources devices optim checkpoint record progress watch plots card evaluate "
        "compare config import_official official_checkpoint official_vocabulary official_weights",
        "model model.network model.frozen",
        "matplotlib numpy pydantic pydantic_core pydantic_settings torch tqdm",
    ),
    "export": Room(
        "run graph to_onnx to_torchscript to_pt2 quantise verify",
        "model model.frozen",
        "numpy onnx onnxruntime onnxscript torch tqdm",
    ),
    "server (ground)": Room("errors runtime", packages="msgspec"),
    "server.config": Room("settings engine_options sources keys", "model", "pydantic"),
    "server.protocol": Room("messages frames json", "model.sampling", "msgspec"),
    "server.engine": Room(
        "process engine scheduler sequence runner drawer pipe",
        "model model.frozen model.frozen.native model.sampling server.protocol server.config server.(ground)",
        "msgspec numpy torch",
    ),
    "server.link": Room("supervisor child mailbox", "model server.protocol server.config", "msgspec"),
    "server.requests": Room(
        "service admission metrics prompts plan generation group scoring prompt_scores results token_list output_text "
        "coroutine offload",
        "model model.sampling server.protocol server.config server.(ground)",
        "msgspec numpy prometheus_client",
    ),
    "server.web": Room(
        "endpoint engine_request body exchange event_stream request_log auth openapi playground",
        "server.requests server.protocol server.(ground)",
        "fastapi msgspec pydantic pydantic_core starlette",
    ),
    "server.dialects": Room(
        "inputs sampling cancel tokenizer special_tokens",
        "model model.sampling server.requests server.web server.protocol server.(ground)",
        "fastapi msgspec pydantic",
    ),
    "server.dialects.generate": Room(
        "schema replies routes",
        "model server.dialects server.requests server.web server.protocol server.(ground)",
        "fastapi msgspec pydantic",
    ),
    "server.dialects.score": Room(
        "schema replies routes",
        "model server.dialects server.requests server.web server.protocol server.(ground)",
        "msgspec numpy pydantic",
    ),
    "server.dialects.openai": Room(
        "schema replies routes work choices logprobs models",
        "model server.dialects server.requests server.web server.protocol server.(ground)",
        "fastapi msgspec pydantic pydantic_core",
    ),
    "server.operation": Room(
        "health tracing request_spans ray_proxy",
        "server.dialects server.dialects.generate server.requests server.web server.config server.protocol "
        "server.(ground)",
        "fastapi msgspec opentelemetry starlette",
    ),
    "server (top)": Room(
        "app __main__ served_model ray_serve reference",
        "model server.dialects server.dialects.generate server.dialects.score server.dialects.openai server.operation "
        "server.requests server.web server.link server.config server.protocol server.(ground)",
        "fastapi msgspec prometheus_fastapi_instrumentator pydantic ray starlette uvicorn uvloop",
    ),
    "allattn": Room(
        "__main__ generate generate_flags",
        "model server.dialects server.dialects.generate server.engine server.requests server.web server.config "
        "server.(top) server.(ground)",
    ),
}


def folder_of(room: str) -> str:
    return room.partition(" ")[0]


def room_names(room: str) -> list[str]:
    """Return the names in HOUSE of the rooms that a room may import."""
    return [name.replace(".(", " (") for name in HOUSE[room].rooms.split()]


ROOM_OF = {f"{folder_of(room)}.{name}": room for room in HOUSE for name in HOUSE[room].modules.split()}
