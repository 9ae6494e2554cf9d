"""Loads the model of a bundle or an artefact for the backend that the options mean."""

import logging
from pathlib import Path
from typing import Protocol

import torch

from model.artefact import is_artefact, open_artefact
from model.backends import AUTO, LoadOptions, chosen
from model.bundle import Bundle, BundleError, inspect_bundle
from model.frozen.baked import BakedLM, load_baked
from model.frozen.exported import load_exported
from model.frozen.served import ServedLM

FALLBACK = "torch"  # the backend that serves if `auto` chose one that cannot load the model

log = logging.getLogger(__name__)


class LoadBundle(Protocol):
    """The type of the function that loads a bundle for a backend."""

    def __call__(self, bundle: Bundle, options: LoadOptions) -> ServedLM:
        """Return the model. Raises BundleError if the weights are wrong, ValueError if an option is impossible here."""
        ...


def load_model(path: Path, options: LoadOptions) -> ServedLM:
    """Check a bundle or an artefact in full, and return its model.

    Raises:
        BundleError: the bundle or artefact is not whole, or cannot be run as asked.
        ValueError: the options ask for CUDA, and there is none.
    """
    if is_artefact(path):
        return load_exported(open_artefact(path), options)
    backend = chosen(options, kind=None)
    assert backend.runs == "bundle"
    bundle = inspect_bundle(path)
    load: LoadBundle = backend.import_loader()
    if options.backend != AUTO or backend.name == FALLBACK:
        return load(bundle, options)
    try:
        return load(bundle, options)
    except BundleError:
        raise
    except ValueError as error:
        log.warning("%s; the backend %s serves instead", error, FALLBACK)
        return load_torch(bundle, options)


def load_torch(bundle: Bundle, options: LoadOptions) -> BakedLM:
    """Return the model of a bundle for the backend `torch`. Raises ValueError if CUDA is asked for and missing."""
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise ValueError("device = 'cuda', but torch sees no CUDA device; allowed here: auto, cpu")
    device = options.device if options.device != AUTO else "cuda" if has_cuda else "cpu"
    return load_baked(bundle, dtype=getattr(torch, options.dtype), device=device)
