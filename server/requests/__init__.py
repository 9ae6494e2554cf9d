"""What a request is once its dialect is gone: admission, prompts, generated and scored sequences."""
