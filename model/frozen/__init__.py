"""The trained network frozen for inference: baked, exported, and its rings."""
