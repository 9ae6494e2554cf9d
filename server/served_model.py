"""The model that the server is told to serve, as the API process sees it, and whether the settings fit it.

Knows no torch and reads no weights: the engine process checks those when it loads them.
"""

from model.artefact import inspect_artefact, is_artefact
from model.backends import AUTO, BACKENDS, backends_for, chosen, names
from model.bundle import Bundle, inspect_bundle
from server.config import ConfigError, Settings


def open_model(settings: Settings) -> tuple[Bundle, Settings]:
    """Returns the model's description, and the settings, of an artefact with its backend in place of `auto`.

    Raises:
        BundleError: the bundle or artefact is not whole.
        ConfigError: backend, dtype, weights or provider do not fit the model.
    """
    kind, dtype = None, None
    if is_artefact(settings.bundle):
        artefact = inspect_artefact(settings.bundle)
        bundle, kind, dtype = artefact.bundle, artefact.manifest.kind, artefact.manifest.dtype
    else:
        bundle = inspect_bundle(settings.bundle)
    what = f"{settings.bundle} is {'a bundle' if kind is None else f'an artefact for {kind}'}"
    allowed = names(backends_for(kind))
    if settings.backend not in (AUTO, *allowed):
        how = "; python -m export.run makes artefacts of bundles" if kind is None else ""
        raise ConfigError(f"backend = {settings.backend!r}, but {what}; allowed: {', '.join((AUTO, *allowed))}{how}")
    backend = chosen(settings, kind=kind).name
    if dtype is not None and "dtype" in settings.model_fields_set and settings.dtype != dtype:
        raise ConfigError(f"dtype = {settings.dtype!r}, but {what} with its state in {dtype}; leave dtype out")
    if settings.provider != AUTO and not BACKENDS[backend].has_providers:
        raise ConfigError(f"provider = {settings.provider!r} is for ONNX artefacts, but {what}; allowed: auto")
    if settings.weights not in (AUTO, *BACKENDS[backend].weights):
        able = ", ".join(row.name for row in BACKENDS.values() if settings.weights in row.weights)
        raise ConfigError(
            f"weights = {settings.weights!r}, but backend = {backend!r} has no such weights; allowed: auto, or "
            f"backend = {able}"
        )
    # of a bundle, `auto` stays: the engine process goes on with torch if the backend of choice cannot load the model
    return bundle, settings if kind is None else settings.model_copy(update={"backend": backend})
