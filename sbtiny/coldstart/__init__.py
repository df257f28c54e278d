"""The cold start: labelled rows, their contrast, their order, the trainer."""
