"""The idea itself: protocol, reward, metrics. Pure Python, no torch."""
