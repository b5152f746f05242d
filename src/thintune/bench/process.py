"""One fresh process for one row, and how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from thintune.bench.limits import MemoryGroup

_PREFIX = "thintune: error: "
_INTERRUPTED = 130
Ending = Literal["finished", "killed", "timed out", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What became of a process."""

    ending: Ending
    found: dict[str, Any]
    """What it wrote; empty if it did not come to that."""
    error: str | None
    duration_s: float
    charged_peak_bytes: int | None = None
    """Most that the kernel counted against its control group, file pages read by it included."""


def run_worker(order: dict[str, Any], group: MemoryGroup | None = None, timeout_s: float | None = None) -> Outcome:
    """Runs `thintune.bench.cost.worker` in a process of its own.

    Args:
        order: JSON values, see the worker.
        group: that the process shall live in, from its first page on.
        timeout_s: after which it is ended.
    """
    with tempfile.TemporaryDirectory(prefix="thintune-bench-") as folder:
        asked, answer, errors = (Path(folder) / name for name in ("order.json", "result.json", "errors.txt"))
        usage = None if group is None else str(group.usage_file)
        asked.write_text(json.dumps({"scratch": folder, "usage_file": usage, **order}), encoding="utf-8")
        words = [sys.executable, "-m", "thintune.bench.cost.worker", str(asked), str(answer)]
        begun = time.perf_counter()
        with open(errors, "wb") as stream:
            code = _run(words if group is None else group.command(words), stream.fileno(), timeout_s)
        duration = round(time.perf_counter() - begun, 3)
        found: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(answer.read_text(encoding="utf-8"))
        error = found.pop("error", None)
        ending = _ending(code)
        if ending == "failed" and error is None:
            lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            error = lines[-1] if lines else f"exit code {code}"
    return Outcome(ending, found, error, duration, None if group is None else group.peak_bytes())


@dataclass(frozen=True)
class CommandOutcome:
    """What became of a command."""

    ending: Ending
    output: str
    """What it printed on standard output."""
    error: str | None
    """The last line of its standard error, where it failed."""
    interrupted: bool
    duration_s: float


def run_command(words: list[str], timeout_s: float | None = None) -> CommandOutcome:
    """Runs a command in a process of its own.

    Args:
        words: of the command.
        timeout_s: after which it is ended.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        begun = time.perf_counter()
        code = _run(words, errors.fileno(), timeout_s, output.fileno())
        duration = round(time.perf_counter() - begun, 3)
        output.seek(0)
        errors.seek(0)
        printed = output.read().decode(errors="replace")
        lines = errors.read().decode(errors="replace").strip().splitlines()
    ending = _ending(code)
    error = None if ending != "failed" else lines[-1].removeprefix(_PREFIX) if lines else f"exit code {code}"
    return CommandOutcome(ending, printed, error, code in (_INTERRUPTED, -signal.SIGINT), duration)


def _run(words: list[str], errors: int, timeout_s: float | None, output: int | None = None) -> int | None:
    """Exit code, or None where the time was over; the process is gone in any case."""
    printed = errors if output is None else output
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=printed, stderr=errors)
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _ending(code: int | None) -> Ending:
    if code is None:
        return "timed out"
    if code == -signal.SIGKILL:
        return "killed"
    return "failed" if code else "finished"


def forget_file_pages(files: Iterable[Path]) -> None:
    """Lets the kernel drop what it keeps of these files, so that whoever reads them next is charged for it."""
    for path in files:
        with contextlib.suppress(OSError, AttributeError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
