"""HTTP to tokens and back: an API process that validates and streams, and an engine process that owns the device."""
