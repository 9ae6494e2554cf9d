"""The loader of a backend that somebody could add; its row in the table is in test_backend_table.py."""

from model.backends import LoadOptions
from model.bundle import Bundle
from model.frozen.loading import load_torch
from model.frozen.served import ServedLM


def load_dummy(bundle: Bundle, options: LoadOptions) -> ServedLM:
    """Load the model of the backend `torch`, under another name."""
    model = load_torch(bundle, options)
    model.backend = "dummy"
    return model
