"""Loads the model of a bundle or an artefact with the backend that the options name."""

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

FALLBACK = "torch"  # serves if `auto` chose a backend that cannot load the model

log = logging.getLogger(__name__)


class LoadBundle(Protocol):
    """The loader of a backend that runs bundles."""

    def __call__(self, bundle: Bundle, options: LoadOptions) -> ServedLM:
        """Load the weights. Raises BundleError if they are wrong, ValueError if an option is impossible here."""
        ...


def load_model(path: Path, options: LoadOptions) -> ServedLM:
    """Load a bundle or an artefact, and check all of it.

    Raises:
        BundleError: the bundle or artefact is not whole, or cannot be run as asked.
        ValueError: CUDA is asked for where there is none.
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
    """The loader of the backend `torch`, which computes the layers one by one."""
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise ValueError("device = 'cuda', but torch sees no CUDA device; allowed here: auto, cpu")
    device = options.device if options.device != AUTO else "cuda" if has_cuda else "cpu"
    return load_baked(bundle, dtype=getattr(torch, options.dtype), device=device)
