"""Accuracy at an equal number of tokens, for models that end at different lengths. Pure.

A model is measured in several settings, each a point (mean tokens, accuracy). Whoever answers each question in one of two settings at
random has, on average, tokens and accuracy on the line between their points; and nobody has to use all the tokens there are. So what
can be had is everything under the upper hull of the points, and that hull is compared.
"""

from collections.abc import Sequence
from itertools import pairwise

Point = tuple[float, float]


def hull(points: Sequence[Point]) -> list[Point]:
    """The corners of the upper hull, by rising tokens and rising accuracy."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if kept and point[1] <= kept[-1][1]:
            continue  # no better for as many tokens or more
        while len(kept) > 1 and not above(kept[-1], kept[-2], point):
            kept.pop()
        kept.append(point)
    return kept


def accuracy_at(points: Sequence[Point], tokens: float) -> float | None:
    """The best accuracy to be had for `tokens` a question on average; None where every setting takes more."""
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
