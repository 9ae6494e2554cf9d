"""The settings of the server: what they are, where they come from, and API keys."""

from server.config.settings import ConfigError, Settings, describe_settings, load_settings, wants_print_config

__all__ = ["ConfigError", "Settings", "describe_settings", "load_settings", "wants_print_config"]
