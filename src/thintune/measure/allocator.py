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
_fixed: tuple[int, int] | None = None
"""Both thresholds as fixed for this process, blocks first; the C library does not tell."""


def return_freed_blocks(threshold_bytes: int = 64 << 10) -> bool:
    """Lets every freed block of this size and more go back to the operating system at once, for the whole process.

    glibc raises this threshold by itself to the largest block ever freed (32 MB at most), and from then on keeps
    tensors in a heap where a short-lived one among long-lived ones leaves a hole. Holding it fixed costs page faults
    for every fresh block: right while a model is loaded and converted, wrong for the steps that follow.

    Returns:
        Whether the C library can do so (glibc's mallopt).
    """
    return _fix(threshold_bytes, 2 * threshold_bytes)


def reuse_freed_blocks(below_bytes: int = 1 << 20) -> bool:
    """Lets freed blocks of less than this stay in the heap for the next ones, after `return_freed_blocks`.

    For the time when what stays has been made, and every step asks for the same short-lived blocks again.

    Returns:
        Whether the C library can do so.
    """
    return _fix(below_bytes, _LARGEST_THRESHOLD)


def keep_freed_blocks() -> bool:
    """Leaves freed blocks in the heap, as glibc does by itself after a while: undoes `return_freed_blocks`.

    For a process that serves, which has nothing to gain from handing blocks back that the next image asks for again.

    Returns:
        Whether the C library can do so.
    """
    global _fixed  # noqa: PLW0603 - it holds for the whole process
    _fixed = None
    return _set_thresholds(_LARGEST_THRESHOLD, 2 * _LARGEST_THRESHOLD)


def release_free_memory(*, collect: bool = True) -> bool:
    """Hands memory that is free but kept by the allocator back to the operating system.

    Loading, calibration and the fit of a head leave the heap full of holes, which a later peak would stand on.

    Args:
        collect: look for unreachable objects first, which takes a while where there are many.

    Returns:
        Whether the C library can do so (glibc's malloc_trim).
    """
    if collect:
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

    Afterwards holds what was fixed for the process, or else what glibc settles on by itself.

    Args:
        threshold_bytes: smallest block to which this applies.
    """
    if _fixed is not None and _fixed[0] <= threshold_bytes:
        yield
        return
    _set_thresholds(threshold_bytes, 2 * threshold_bytes)
    try:
        yield
    finally:
        _set_thresholds(*(_fixed or (_LARGEST_THRESHOLD, 2 * _LARGEST_THRESHOLD)))


def _fix(blocks: int, free: int) -> bool:
    global _fixed  # noqa: PLW0603 - it holds for the whole process
    done = _set_thresholds(blocks, free)
    if done:
        _fixed = blocks, free
    return done


def _set_thresholds(blocks: int, free: int) -> bool:
    """Bytes of a block that is mapped by itself, and of free memory at the heap's end that is kept."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        return bool(library.mallopt(_M_MMAP_THRESHOLD, blocks)) and bool(library.mallopt(_M_TRIM_THRESHOLD, free))
    except (AttributeError, OSError):
        return False
