"""Memory that the C library keeps after it was freed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3): free memory at the heap's end that is kept; blocks that are mapped one by one, unmapped when freed."""
_LARGEST_THRESHOLD = 32 << 20
"""Where glibc's own adjustment ends up once large blocks have been freed."""
_fixed_bytes: int | None = None
"""What `return_freed_blocks` fixed for this process; the C library does not tell."""


def return_freed_blocks(threshold_bytes: int = 64 << 10) -> bool:
    """Lets every freed block of this size and more go back to the operating system at once, for the whole process.

    glibc raises this threshold by itself to the largest block ever freed (32 MB at most), and from then on keeps
    tensors in a heap where a short-lived one among long-lived ones leaves a hole. Holding it fixed costs page faults
    for every fresh block: right while a model is loaded and converted, wrong for the steps that follow.

    Returns:
        Whether the C library can do so (glibc's mallopt).
    """
    global _fixed_bytes  # noqa: PLW0603 - so is what it remembers
    done = _set_threshold(threshold_bytes)
    if done:
        _fixed_bytes = threshold_bytes
    return done


def reuse_freed_blocks() -> bool:
    """Lets freed blocks stay in the heap for the next ones: the opposite of `return_freed_blocks`, from here on.

    For the time when what stays has been made, and every step asks for the same short-lived blocks again.

    Returns:
        Whether the C library can do so.
    """
    global _fixed_bytes  # noqa: PLW0603 - so is what it remembers
    _fixed_bytes = None
    return _set_threshold(_LARGEST_THRESHOLD)


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


@contextlib.contextmanager
def returning_large_blocks(threshold_bytes: int = 64 << 10) -> Iterator[None]:
    """Inside, every freed block of this size and more goes back to the operating system at once.

    Afterwards holds what `return_freed_blocks` fixed for the process, or else what glibc settles on by itself.

    Args:
        threshold_bytes: smallest block to which this applies.
    """
    if _fixed_bytes is not None and _fixed_bytes <= threshold_bytes:
        yield
        return
    _set_threshold(threshold_bytes)
    try:
        yield
    finally:
        _set_threshold(_LARGEST_THRESHOLD if _fixed_bytes is None else _fixed_bytes)


def _set_threshold(size: int) -> bool:
    """Fixes both thresholds in the proportion that glibc keeps them in, 1 to 2."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        return bool(library.mallopt(_M_MMAP_THRESHOLD, size)) and bool(library.mallopt(_M_TRIM_THRESHOLD, 2 * size))
    except (AttributeError, OSError):
        return False
