"""Resident memory against allocations of known size, in a fresh process where nothing else allocates."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from thintune.measure import memory

MEBIBYTE = 1 << 20

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc")

SCRIPT = """
import json
from thintune.measure import peak_rss_bytes, reset_peak_rss, rss_bytes

out = {"before": rss_bytes()}
block = bytearray(96 << 20)
block[::4096] = b"x" * len(block[::4096])  # touched page by page
out["held"] = rss_bytes()
del block
out["freed"] = rss_bytes()
out["peak"] = peak_rss_bytes()
out["reset"] = reset_peak_rss()
out["peak_after_reset"] = peak_rss_bytes()
print(json.dumps(out))
"""


@needs_proc
def test_resident_memory_follows_a_touched_allocation_and_the_peak_remembers_it():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    seen = json.loads(run.stdout)
    assert seen["held"] - seen["before"] == pytest.approx(96 * MEBIBYTE, abs=4 * MEBIBYTE)
    assert seen["held"] - seen["freed"] == pytest.approx(96 * MEBIBYTE, abs=4 * MEBIBYTE)
    assert seen["peak"] >= seen["held"] - MEBIBYTE
    if seen["reset"]:
        assert seen["peak_after_reset"] < seen["held"] - 80 * MEBIBYTE


def write_status(path: Path, rss_kb: int, peak_kb: int) -> None:
    path.write_text(
        f"Name:\tpython\nVmPeak:\t  999999 kB\nVmHWM:\t  {peak_kb} kB\nVmRSS:\t  {rss_kb} kB\nThreads:\t1\n"
    )


@pytest.fixture
def proc(tmp_path, monkeypatch):
    """A process of 100 MiB with a high-water mark of 300 MiB, on a kernel that ignores the reset."""
    write_status(tmp_path / "status", 100 * 1024, 300 * 1024)
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "clear_refs")
    return tmp_path


def test_the_fields_are_read_in_bytes(proc):
    assert memory.rss_bytes() == 100 * MEBIBYTE
    assert memory.peak_rss_bytes() == 300 * MEBIBYTE


def test_a_reset_that_is_accepted_but_ignored_is_reported_as_failed(proc):
    assert memory.reset_peak_rss() is False
    assert (proc / "clear_refs").read_text() == "5"


def test_a_reset_that_shows_in_the_mark_is_reported_as_done(proc):
    write_status(proc / "status", 100 * 1024, 101 * 1024)
    assert memory.reset_peak_rss() is True


def test_a_reset_that_is_refused_is_reported_as_failed(proc):
    write_status(proc / "status", 100 * 1024, 100 * 1024)
    (proc / "clear_refs").mkdir()
    assert memory.reset_peak_rss() is False


@pytest.mark.parametrize(
    "text", [None, "Name:\tpython\n", "VmRSS:\t 0 kB\nVmHWM:\t 0 kB\n", "VmRSS:\t?\nVmHWM:\t1 MB\n"]
)
def test_what_is_not_known_is_none_and_never_zero(proc, text):
    (proc / "status").unlink() if text is None else (proc / "status").write_text(text)
    assert memory.rss_bytes() is None
    assert memory.peak_rss_bytes() is None
    assert memory.reset_peak_rss() is False
