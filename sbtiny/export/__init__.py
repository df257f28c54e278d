"""The trained policy as files that other programs run, and the proof that it is still the trained policy."""
