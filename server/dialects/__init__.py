"""The wire formats: each translates its requests and replies to those of server.requests."""
