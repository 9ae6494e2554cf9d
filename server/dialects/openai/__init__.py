"""POST /v1/completions and GET /v1/models, as OpenAI has them."""
