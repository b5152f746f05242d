"""Step times that can be compared: alternated, with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from thintune.errors import ConfigError


def median_and_iqr(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Returns the median and the interquartile range, quartiles interpolated linearly between the values.

    Args:
        values: finite, any order, any unit.

    Returns:
        (median, range), in the unit of `values`. `(None, None)` without values; the range of a single value is `None`
        too, as one value tells nothing of a spread.
    """
    if not values:
        return None, None
    if len(values) == 1:
        return float(values[0]), None
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return middle, third - first


def interleave(fns: Mapping[str, Callable[[], object]], repeats: int, warmup: int) -> dict[str, list[float]]:
    """Times callables in turn, so that a drift of the machine (heat, other load) meets all of them alike.

    Each round calls every one once and begins one further than the round before, so none always runs after the same
    neighbour with the caches it leaves.

    Args:
        fns: name -> callable; what it returns is dropped.
        repeats: timed rounds, >= 1.
        warmup: rounds before them that are not timed, >= 0.

    Returns:
        name -> `repeats` wall-clock times in seconds, in the order of the rounds. GPU work is waited for.

    Raises:
        ConfigError: `repeats` or `warmup` out of range.
    """
    if repeats < 1 or warmup < 0:
        raise ConfigError(f"interleave: expected repeats >= 1 and warmup >= 0, got {repeats} and {warmup}.")
    names = list(fns)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        start = turn % max(len(names), 1)
        for name in names[start:] + names[:start]:
            seconds = _time_once(fns[name])
            if turn >= warmup:
                times[name].append(seconds)
    return times


def synchronize() -> None:
    """Waits for the work queued on the GPU; does nothing, and starts no GPU context, where none is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _time_once(fn: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    fn()
    synchronize()
    return time.perf_counter() - start
