"""Memory that the C library keeps after it was freed."""

from __future__ import annotations

import ctypes
import gc
import sys


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
