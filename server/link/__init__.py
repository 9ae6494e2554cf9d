"""The API process's end: the engine process is started, watched and replaced."""
