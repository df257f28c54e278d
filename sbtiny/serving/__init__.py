"""Answers to a user, with the budget in the user's hand: the Python API, chat."""
