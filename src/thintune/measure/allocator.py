"""Memory that the C library keeps after it was freed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator

_M_MMAP_THRESHOLD = -3
"""Of mallopt(3): blocks of this size and more are mapped one by one, and unmapped when freed."""


def return_freed_blocks(threshold_bytes: int = 64 << 10) -> bool:
    """Lets every freed block of this size and more go back to the operating system at once, for the whole process.

    glibc raises this threshold by itself to the largest block ever freed (32 MB at most), and from then on keeps
    tensors in a heap where a short-lived one among long-lived ones leaves a hole. Holding it fixed costs page faults
    for every fresh block: right where little memory moves, wrong for large batches.

    Returns:
        Whether the C library can do so (glibc's mallopt).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, threshold_bytes))
    except (AttributeError, OSError):
        return False


def release_free_memory() -> bool:
    """Hands memory that is free but kept by the allocator back to the operating system.

    Loading, calibration and the fit of a head leave the heap full of holes, which a later peak would stand on.

    Returns:
        Whether the C library can do so (glibc's malloc_trim).
    """
    gc.collect()
    if not sys.platform.startswith("linux"):
        return False
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return False
    return True


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGEST_MMAP_THRESHOLD = 32 << 20  # where glibc's own adjustment ends up once large blocks have been freed


@contextlib.contextmanager
def returning_large_blocks(threshold_bytes: int = 1 << 18) -> Iterator[None]:
    """Inside, a freed block of some size goes back to the operating system at once instead of staying in the heap.

    Every such block is mapped anew, which costs time; the peak is that of what is in use.

    Args:
        threshold_bytes: smallest block to which this applies.
    """
    if not _set_thresholds(threshold_bytes):
        yield
        return
    try:
        yield
    finally:
        _set_thresholds(_LARGEST_MMAP_THRESHOLD)


def _set_thresholds(mmap_bytes: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        return bool(library.mallopt(_MMAP_THRESHOLD, mmap_bytes)) and bool(
            library.mallopt(_TRIM_THRESHOLD, 2 * mmap_bytes)
        )
    except (AttributeError, OSError):
        return False
