"""POST /v1/completions and GET /v1/models, in OpenAI's format."""
