"""Requests in the terms of the engine, without a wire format: admission, prompts, generation and scoring."""
