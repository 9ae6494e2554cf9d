"""What surrounds every endpoint: body, request log, keys, events, the OpenAPI document, the page."""
