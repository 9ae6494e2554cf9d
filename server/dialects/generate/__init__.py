"""POST /generate, in the format of text-generation-inference."""
