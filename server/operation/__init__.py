"""For operators: health, tracing, Ray Serve's proxy."""
