"""Questions, and how an answer is checked."""
