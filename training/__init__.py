"""Corpus to bundle: everything that happens before a model is served."""
