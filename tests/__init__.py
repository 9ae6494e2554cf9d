"""The tests, laid out as the packages they test; helpers are in tests/support."""
