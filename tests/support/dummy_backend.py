"""The loader of a backend as somebody might add it; its row is in test_backend_table.py."""

from model.backends import LoadOptions
from model.bundle import Bundle
from model.frozen.loading import load_torch
from model.frozen.served import ServedLM


def load_dummy(bundle: Bundle, options: LoadOptions) -> ServedLM:
    """The backend `torch` under another name."""
    model = load_torch(bundle, options)
    model.backend = "dummy"
    return model
