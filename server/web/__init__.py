"""HTTP for all endpoints: bodies, event streams, API keys, the request log, the OpenAPI document and the playground."""
