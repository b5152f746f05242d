"""One block that measures what runs inside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from thintune.measure.activations import SavedActivations
from thintune.measure.memory import peak_rss_bytes, reset_peak_rss, rss_bytes
from thintune.measure.timing import synchronize


@dataclass(eq=False)
class Measurement:
    """What a block cost; filled when the block ends, and `None` where it could not be measured.

    Attributes:
        baseline_rss_bytes: resident memory when the block began, the runtime and everything loaded so far.
        peak_rss_bytes: most resident memory during the block; if `peak_is_exact` is false, only a bound from above.
        peak_is_exact: whether the peak is known to belong to the block. False where the system does not let the
            high-water mark be reset and the block stayed below a mark that was set before it.
        duration_s: wall-clock time of the block.
        saved_activation_bytes: peak of the bytes that autograd held, without the weights of the tracked model.
        cuda_peak_bytes: most memory allocated by torch on one GPU during the block.
    """

    baseline_rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    peak_is_exact: bool | None = None
    duration_s: float | None = None
    saved_activation_bytes: int | None = None
    cuda_peak_bytes: int | None = None
    _mark: int | None = field(default=None, repr=False)  # high-water mark when the block began

    @property
    def peak_above_baseline_bytes(self) -> int | None:
        """Peak minus baseline: what the block added to the process, if it was not room freed before."""
        if self.peak_rss_bytes is None or self.baseline_rss_bytes is None:
            return None
        return max(self.peak_rss_bytes - self.baseline_rss_bytes, 0)

    def _begin(self) -> None:
        was_reset = reset_peak_rss()
        self._mark = None if was_reset else peak_rss_bytes()
        self.peak_is_exact = was_reset or None
        self.baseline_rss_bytes = rss_bytes()
        _reset_cuda_peaks()

    def _read_peaks(self) -> None:
        """Takes in the peaks so far; called again before anything resets the marks."""
        peak = peak_rss_bytes()
        if peak is not None:
            self.peak_is_exact = self.peak_is_exact or self._mark is None or peak > self._mark
            self.peak_rss_bytes = max(peak, self.peak_rss_bytes or 0)
        self.cuda_peak_bytes = _larger(self.cuda_peak_bytes, _cuda_peak_bytes())


_running: list[Measurement] = []


@contextmanager
def track(model: nn.Module | None = None) -> Iterator[Measurement]:
    """Measures memory and time of a block, for any code: a training loop, an evaluation, a conversion.

    Blocks may be nested. Memory that was freed before the block but is still resident is part of the baseline and may
    be used again without raising the peak, so numbers to publish come from a fresh process. Counting saved activations
    costs some microseconds for each saved tensor; for times alone leave out `model`.

    Args:
        model: what is trained; without it saved activations are not counted, as they could not be told from weights.

    Yields:
        The measurement, filled when the block ends, with an exception too.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> with track(model) as m:
        ...     model(torch.ones(5, 4)).sum().backward()
        >>> m.saved_activation_bytes
        80
    """
    for outer in _running:
        outer._read_peaks()
    measurement = Measurement()
    measurement._begin()
    _running.append(measurement)
    saved = nullcontext() if model is None else SavedActivations(exclude=model)
    synchronize()
    start = time.perf_counter()
    try:
        with saved:
            yield measurement
    finally:
        synchronize()
        measurement.duration_s = time.perf_counter() - start
        measurement._read_peaks()
        _running.remove(measurement)
        if isinstance(saved, SavedActivations) and not saved.unmeasured:
            measurement.saved_activation_bytes = saved.bytes


def _reset_cuda_peaks() -> None:
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def _cuda_peak_bytes() -> int | None:
    if not torch.cuda.is_initialized():
        return None
    return max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))


def _larger(first: int | None, second: int | None) -> int | None:
    known = [value for value in (first, second) if value is not None]
    return max(known, default=None)
