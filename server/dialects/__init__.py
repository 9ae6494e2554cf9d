"""The wire formats (dialects): each translates its bodies and replies from and to the types of server.requests."""
