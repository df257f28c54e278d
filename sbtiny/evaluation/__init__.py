"""Held-out figures, plots and the report page."""
