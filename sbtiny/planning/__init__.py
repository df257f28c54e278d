"""Estimates of memory, tokens and time before a stage runs."""
