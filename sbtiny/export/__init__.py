"""Export the trained policy to files for other programs, and check that they still are that policy."""
