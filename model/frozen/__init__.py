"""Frozen networks: what serves them, and their state."""
