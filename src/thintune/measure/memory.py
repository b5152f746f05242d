"""Resident memory of this process, as the Linux kernel counts it.

VmRSS is what is resident now, VmHWM the most that ever was (the high-water mark). Both come from
`/proc/self/status`; where that file does not exist the answer is `None`.
"""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): 5 sets the high-water mark to the current resident size
_RESET_SLACK_BYTES = 4 << 20  # what other threads may touch between the reset and the check of it


def rss_bytes() -> int | None:
    """Returns the resident memory of this process in bytes (VmRSS), `None` where the system does not tell."""
    return _status_bytes("VmRSS")


def peak_rss_bytes() -> int | None:
    """Returns the peak of the resident memory since start or reset in bytes (VmHWM), `None` if unknown.

    The kernel brings the mark up to date only now and then, so what is resident now may be above it.
    """
    peak, current = _status_bytes("VmHWM"), rss_bytes()
    return peak if peak is None or current is None else max(peak, current)


def reset_peak_rss() -> bool:
    """Lowers the high-water mark to what is resident now, for the whole process.

    Whoever reads the peak of the whole run must do so before: the old mark is lost.

    Returns:
        Whether it worked, which is checked and not only assumed: some containers refuse the write, others accept and
        ignore it.
    """
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    current, peak = rss_bytes(), peak_rss_bytes()
    return current is not None and peak is not None and peak <= current + _RESET_SLACK_BYTES


def _status_bytes(field: str) -> int | None:
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return _parse_kilobytes(value)
    return None


def _parse_kilobytes(value: str) -> int | None:
    """`"   1776 kB"` -> 1818624; the kernel's kB are 1024 bytes. `None` for anything else, and for zero."""
    number, _, unit = value.strip().partition(" ")
    if unit.strip() != "kB" or not number.isdigit():
        return None
    return int(number) * 1024 or None
