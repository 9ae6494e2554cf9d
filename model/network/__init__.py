"""The network as it is trained."""
