"""Measurements of what a callable or a block really costs: resident memory, saved activations, FLOPs and time.

What could not be measured is `None`, never 0.
"""

from thintune.measure import provenance
from thintune.measure.activations import SavedActivations
from thintune.measure.allocator import (
    keep_freed_blocks,
    release_free_memory,
    return_freed_blocks,
    returning_large_blocks,
    reuse_freed_blocks,
)
from thintune.measure.flops import count_flops
from thintune.measure.memory import peak_rss_bytes, reset_peak_rss, rss_bytes
from thintune.measure.timing import interleave, median_and_iqr
from thintune.measure.tracker import Measurement, track

__all__ = [
    "Measurement",
    "SavedActivations",
    "count_flops",
    "interleave",
    "keep_freed_blocks",
    "median_and_iqr",
    "peak_rss_bytes",
    "provenance",
    "release_free_memory",
    "reset_peak_rss",
    "return_freed_blocks",
    "returning_large_blocks",
    "reuse_freed_blocks",
    "rss_bytes",
    "track",
]
