"""The engine process: scheduler, engine and the runner that owns the device."""
