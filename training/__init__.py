"""Training: from a corpus to a bundle. Also evaluation of bundles, and import of the authors' checkpoints."""
