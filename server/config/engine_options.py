"""The settings of the engine: the one place where each is declared, with its default and range."""

from pathlib import Path

from pydantic import Field

from model.backends import LoadOptions


class EngineOptions(LoadOptions):
    """The settings that the engine process gets at its start. `Settings` adds those of the API process."""

    bundle: Path = Field(default=Path("bundles/default"), description="directory of the model: a bundle or an artefact")
    num_rows: int = Field(default=32, ge=1, description="sequences that are computed at the same time")
    batch_invariant: bool = Field(
        default=True, description="compute at least 4 rows, so that on a CPU neighbours never change a request's bits"
    )
    chunk_tokens: int = Field(default=64, ge=1, description="prompt tokens that one row reads at a time")
    budget_tokens: int = Field(
        default=1024, ge=1, description="most prompt tokens all rows read in a step; one chunk is always read"
    )
    prefill_ms: float = Field(
        default=10, ge=0, description="most milliseconds of reading prompts in a step while others generate, likewise"
    )
