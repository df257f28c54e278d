"""Accuracy at equal mean tokens, for models of different answer length. Pure.

A model is measured in several settings, each a point (mean tokens, accuracy). Choosing one of two settings at random for each question
gives, on average, a point on the line between theirs. More tokens never force a lower accuracy. So a model can reach every point under
the upper hull of its points, and the hulls are compared.
"""

from collections.abc import Sequence
from itertools import pairwise

Point = tuple[float, float]


def hull(points: Sequence[Point]) -> list[Point]:
    """Find the corners of the upper hull, by rising tokens and rising accuracy."""
    corners: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if corners and point[1] <= corners[-1][1]:
            continue  # not more accurate, with no fewer tokens
        while len(corners) > 1 and not above(corners[-1], corners[-2], point):
            corners.pop()
        corners.append(point)
    return corners


def accuracy_at(points: Sequence[Point], tokens: float) -> float | None:
    """Find the best accuracy at `tokens` a question on average; None where every setting takes more."""
    corners = hull(points)
    if not corners or tokens < corners[0][0]:
        return None
    for (x, y), (to_x, to_y) in pairwise(corners):
        if tokens <= to_x:
            return y + (to_y - y) * (tokens - x) / (to_x - x)
    return corners[-1][1]


def above(point: Point, left: Point, right: Point) -> bool:
    """Whether the point lies above the line from `left` to `right`."""
    return (point[1] - left[1]) * (right[0] - left[0]) > (right[1] - left[1]) * (point[0] - left[0])
