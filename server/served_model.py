"""What the server is told to serve: a bundle or an artefact, and whether the settings fit it. Knows no torch."""

from model.artefact import is_artefact, open_artefact
from model.bundle import Bundle, open_bundle
from server.config import ConfigError, Settings


def open_model(settings: Settings) -> tuple[Bundle, Settings]:
    """The description of the model, and the settings with the backend that they mean.

    Raises:
        BundleError: the bundle or artefact is not whole.
        ConfigError: backend, dtype or provider are for a model of another kind.
    """
    kind, dtype = "torch", None
    if is_artefact(settings.bundle):
        artefact = open_artefact(settings.bundle)
        bundle, kind, dtype = artefact.bundle, artefact.manifest.kind, artefact.manifest.dtype
    else:
        bundle = open_bundle(settings.bundle)
    what = f"{settings.bundle} is {'a bundle' if kind == 'torch' else f'an artefact for {kind}'}"
    if settings.backend not in ("auto", kind):
        how = "; python -m export.run makes artefacts of bundles" if kind == "torch" else ""
        raise ConfigError(f"backend = {settings.backend!r}, but {what}; allowed: auto, {kind}{how}")
    if dtype is not None and "dtype" in settings.model_fields_set and settings.dtype != dtype:
        raise ConfigError(f"dtype = {settings.dtype!r}, but {what} with its state in {dtype}; leave dtype out")
    if settings.provider != "auto" and kind != "onnx":
        raise ConfigError(f"provider = {settings.provider!r} is for ONNX artefacts, but {what}; allowed: auto")
    return bundle, settings.model_copy(update={"backend": kind})
