"""The network in its training form."""
