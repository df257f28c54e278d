"""Decoding: the one loop that turns requests into episodes."""
