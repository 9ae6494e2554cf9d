"""The table of backends, which compute models, and the options of loading a model. Imports no torch.

To add a backend, write a row of this table, the file that the row names, and tests of that file. The choices of
--backend, the kinds of artefacts, the loader and the checks of settings follow from the table.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

AUTO: Final = "auto"


@dataclass(frozen=True)
class Backend:
    """A backend, which is one way to compute a model: a row of the table."""

    name: str  # in --backend, in the manifest of an artefact and in GET /info
    runs: Literal["bundle", "artefact"]  # an artefact names the only backend that runs it
    loader: str  # module:function, of type `LoadBundle` or `LoadGraphs` (model/frozen); imported when a model is loaded
    suits: str = ""  # module:function of `LoadOptions`, without torch: whether `auto` may mean this; empty = yes
    package: str = ""  # the package that the loader imports beside torch
    extra: str = ""  # the extra of allattn that installs the package
    weights: tuple[str, ...] = ()  # values of the setting `weights` that the backend takes beside auto
    has_providers: bool = False  # whether the setting `provider` has a meaning
    has_own_threads: bool = False  # whether it computes in threads of its own, not OpenMP's

    def import_loader(self) -> Callable[..., Any]:
        """Import the function that `loader` names, and return it. Raises ImportError."""
        return _import(self.loader)

    def suits_here(self, options: "LoadOptions") -> bool:
        """Return whether `auto` may mean this backend on this machine, with these options."""
        return not self.suits or bool(_import(self.suits)(options))


def _import(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


BACKENDS = {
    row.name: row
    for row in (
        Backend(
            "native",
            runs="bundle",
            loader="model.frozen.native.lm:load_native",
            suits="model.frozen.native.build:suits",
            weights=("float32", "bfloat16", "int8", "int4"),
            has_own_threads=True,
        ),
        Backend("torch", runs="bundle", loader="model.frozen.loading:load_torch"),
        Backend("torchscript", runs="artefact", loader="model.frozen.torch_graphs:load_script"),
        Backend(
            "onnx",
            runs="artefact",
            loader="model.frozen.onnx_graphs:OnnxGraphs",
            package="onnxruntime",
            extra="onnx",
            has_providers=True,
            has_own_threads=True,
        ),
        Backend("pt2", runs="artefact", loader="model.frozen.torch_graphs:load_packages"),
    )
}


def backends_for(kind: str | None) -> list[Backend]:
    """Return the backends that run a model; `auto` means the first of them that suits the machine.

    Args:
        kind: the kind of an artefact; None = the model is a bundle.
    """
    return [row for row in BACKENDS.values() if (row.runs == "bundle" if kind is None else row.name == kind)]


def names(rows: Iterable[Backend]) -> tuple[str, ...]:
    """Return the names of some rows."""
    return tuple(row.name for row in rows)


def _artefact_kinds() -> tuple[str, ...]:
    return names(row for row in BACKENDS.values() if row.runs == "artefact")


@dataclass(frozen=True)
class OneOf:
    """An annotation: a text must be one of some names. Each check asks for the names, since the table may grow."""

    names: Callable[[], tuple[str, ...]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema of the type, followed by the check; pydantic calls this."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, text: str) -> str:
        *others, last = map(repr, self.names())
        if text not in self.names():
            raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
        return text


ArtefactKind = Annotated[str, OneOf(_artefact_kinds)]
BackendChoice = Annotated[str, OneOf(lambda: (AUTO, *BACKENDS))]


class LoadOptions(BaseModel):
    """The options of loading a model. The server's settings inherit them (server/config)."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    backend: BackendChoice = Field(
        default=AUTO,
        description="backend that computes; auto = native, or torch with a GPU, for a bundle; an artefact has its own",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="number format of a bundle's weights and state; an artefact has its own"
    )
    weights: Literal["auto", "float32", "bfloat16", "int8", "int4"] = Field(
        default=AUTO, description="number format of a bundle's weights with the native backend; auto goes with dtype"
    )
    native_variant: str = Field(
        default=AUTO,
        description="instructions of the native backend: generic, avx2, avx512, avx512_vnni or amx; auto = the fastest",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default=AUTO, description="auto takes a GPU where there is one")
    provider: Literal["auto", "cpu", "cuda"] = Field(
        default=AUTO, description="execution provider of an ONNX artefact; auto goes with the device"
    )
    num_threads: int | None = Field(
        default=None, ge=1, description="CPU threads of the engine; as torch chooses if not set"
    )


def chosen(options: LoadOptions, *, kind: str | None) -> Backend:
    """Return the backend that the options mean for a model. `kind` is as for `backends_for`."""
    if options.backend != AUTO:
        return BACKENDS[options.backend]
    return next(row for row in backends_for(kind) if row.suits_here(options))
