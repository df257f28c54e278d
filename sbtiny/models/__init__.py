"""Weights: names, loading, and what this machine can hold."""
