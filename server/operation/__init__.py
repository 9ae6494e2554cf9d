"""Operation of the server: health, tracing, Ray Serve's proxy."""
