"""The trained network, frozen for inference: its backends, and the rings of its live streams."""
