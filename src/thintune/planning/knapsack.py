"""One option a layer, least summed error under a budget of bytes: the multiple-choice knapsack of rank selection.

The dynamic programme of arXiv 2505.05086 (ASI) and 2510.09160 (WASI), but over Pareto fronts of partial plans instead
of a table of coarse memory bins: nothing is rounded, so the plan is the one that trying all combinations would find.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from thintune.errors import ConfigError

MAX_POINTS = 20_000

# A partial plan: (cost, error, path). The path is a number with one digit for each layer decided so far, the option's
# index, in a base that exceeds every index: comparing two paths of equal length compares their indices layer by layer.
Point = tuple[int, float, int]


@dataclass(frozen=True)
class Option:
    """What a layer may be given.

    Attributes:
        cost_bytes: memory it takes, >= 0.
        error: what it loses, finite and >= 0, on a scale that may be summed over the layers.
    """

    cost_bytes: int
    error: float


def choose(options: Sequence[Sequence[Option]], budget_bytes: int, *, max_points: int = MAX_POINTS) -> list[int]:
    """Returns the option to take for each layer: least summed error with the summed cost within the budget.

    The best plan, exactly, as long as no more than `max_points` partial plans are undominated at once. Beyond that,
    what each option costs above the cheapest of its layer is rounded **up** to a granule: what the budget leaves above
    the cheapest plan, divided by `max_points`. A rounded plan never exceeds the budget, and it is at least as good as
    the best plan of a budget that is smaller by one granule a layer.

    Args:
        options: for each layer its options, at least one, in any order.
        budget_bytes: what all layers together may cost.
        max_points: bound of the front, >= 1; time and memory grow with it.

    Returns:
        Index of the option taken, one a layer. Among equal errors the smaller cost wins, among equal costs the lower
        index, of the first layer where two plans differ.

    Raises:
        ConfigError: a layer without options, a cost or an error out of range, a budget below the least possible cost.

    Example:
        >>> layer = [Option(100, 4.0), Option(300, 1.0)]
        >>> choose([layer, layer], budget_bytes=450)
        [0, 1]
    """
    _check(options, max_points)
    least = [min(option.cost_bytes for option in layer) for layer in options]
    free = budget_bytes - sum(least)
    if free < 0:
        raise ConfigError(
            f"planning: a budget of {budget_bytes} bytes is not enough for {len(options)} layers, the cheapest options "
            f"take {sum(least)} bytes; raise the budget to {sum(least)} bytes or offer smaller ranks."
        )
    base = max((len(layer) for layer in options), default=1)
    path = _solve(options, least, free, base, granule=1, max_points=max_points)
    if path is None:
        granule = -(-free // max_points)
        path = _solve(options, least, free, base, granule=granule, max_points=max_points + 1)
    assert path is not None  # rounded costs are multiples of the granule: at most max_points + 1 of them fit
    return _digits(path, base, len(options))


def _solve(
    options: Sequence[Sequence[Option]], least: Sequence[int], free: int, base: int, *, granule: int, max_points: int
) -> int | None:
    """Path of the best plan whose extra cost, rounded up to `granule`, is within `free`; `None` if the front overflows.

    Costs here are what an option takes above the cheapest of its layer, so every prefix can be completed.
    """
    limit = free // granule
    front: list[Point] = [(0, 0.0, 0)]
    for layer, floor in zip(options, least, strict=True):
        steps = _pareto(
            (-(-(option.cost_bytes - floor) // granule), option.error, index) for index, option in enumerate(layer)
        )
        front = _pareto(
            (cost + extra, error + loss, path * base + index)
            for extra, loss, index in steps
            for cost, error, path in front
            if cost + extra <= limit
        )
        if len(front) > max_points:
            return None
    return front[-1][2]


def _pareto(points: Iterable[Point]) -> list[Point]:
    """Undominated points, dearer and better from one to the next; of equal ones the lowest path."""
    front: list[Point] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _digits(path: int, base: int, length: int) -> list[int]:
    digits = [0] * length
    for place in reversed(range(length)):
        path, digits[place] = divmod(path, base)
    return digits


def _check(options: Sequence[Sequence[Option]], max_points: int) -> None:
    problems = [] if max_points >= 1 else [f"max_points: expected at least 1, got {max_points}"]
    for number, layer in enumerate(options):
        if not layer:
            problems.append(f"layer {number}: no options to choose from")
        for index, option in enumerate(layer):
            if option.cost_bytes < 0:
                problems.append(f"layer {number}, option {index}: expected cost_bytes >= 0, got {option.cost_bytes}")
            if not math.isfinite(option.error) or option.error < 0:
                problems.append(f"layer {number}, option {index}: expected a finite error >= 0, got {option.error}")
    if problems:
        raise ConfigError("planning: " + "; ".join(problems) + ".")
