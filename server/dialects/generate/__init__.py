"""POST /generate, as text-generation-inference has it."""
