"""The settings of the server: what they are, where they come from, and API keys."""

from server.config.engine_options import EngineOptions
from server.config.settings import Settings
from server.config.sources import ConfigError, describe_settings, load_settings, wants_print_config

__all__ = ["ConfigError", "EngineOptions", "Settings", "describe_settings", "load_settings", "wants_print_config"]
