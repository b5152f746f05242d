"""A hard limit of the kernel on the memory of one process: a control group of its own, version 1 or 2.

The group lies below that of this process (version 2: below its parent's, where this process itself is in the way), so
that a limit can only be added to those already there. Swap is off. What the kernel counts is not resident memory: pages
of files that another process had read before are free, those of files read first here count and are given back under
pressure. A process that wants more than the limit is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from thintune.errors import ThintuneError

_PROC = Path("/proc/self")


class LimitNotPermittedError(ThintuneError, PermissionError):
    """The system lets no control group be made here."""


class _Files(NamedTuple):
    limit: str
    swap: tuple[str, ...]
    usage: str
    peak: str
    events: str


_V1 = _Files(
    "memory.limit_in_bytes",
    ("memory.memsw.limit_in_bytes",),
    "memory.usage_in_bytes",
    "memory.max_usage_in_bytes",
    "memory.oom_control",
)
_V2 = _Files("memory.max", ("memory.swap.max",), "memory.current", "memory.peak", "memory.events")


class MemoryGroup:
    """A control group for one process, removed at the end of the block.

    Args:
        limit_bytes: of memory and swap together; None only counts.

    Raises:
        LimitNotPermittedError: with the reason.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._files, self.path = _make_group()
        self.limit_bytes = limit_bytes
        if limit_bytes is None:
            return
        try:
            (self.path / self._files.limit).write_text(str(limit_bytes))
            self._forbid_swap(limit_bytes)
        except OSError as error:
            self.close()
            raise LimitNotPermittedError(f"{self.path}: {error.strerror or error}.") from error

    def _forbid_swap(self, limit_bytes: int) -> None:
        version_1 = self._files is _V1
        with contextlib.suppress(OSError):  # not there where the kernel does not count swap
            (self.path / self._files.swap[0]).write_text(str(limit_bytes) if version_1 else "0")
        if version_1:
            with contextlib.suppress(OSError):
                (self.path / "memory.swappiness").write_text("0")

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def command(self, words: list[str]) -> list[str]:
        """The command that runs `words` inside the group, from the first page on."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *words]

    @property
    def usage_file(self) -> Path:
        """Bytes that the kernel counts now."""
        return self.path / self._files.usage

    def peak_bytes(self) -> int | None:
        """Most bytes that the kernel counted, None where it does not tell."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.path / self._files.peak).read_text())
        return None

    def kills(self) -> int:
        """Processes of the group that the kernel has killed for want of memory."""
        with contextlib.suppress(OSError):
            found = re.search(r"^oom_kill (\d+)", (self.path / self._files.events).read_text(), re.MULTILINE)
            return int(found[1]) if found else 0
        return 0

    def close(self) -> None:
        """Ends what is left in the group and removes it."""
        for _ in range(50):
            with contextlib.suppress(OSError, ValueError):
                for number in (self.path / "cgroup.procs").read_text().split():
                    os.kill(int(number), signal.SIGKILL)
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.1)


def why_not_permitted() -> str | None:
    """Why no limit can be set here, or None where it can."""
    try:
        MemoryGroup(1 << 30).close()
    except LimitNotPermittedError as error:
        return str(error)
    return None


def _make_group() -> tuple[_Files, Path]:
    reasons = []
    finders: dict[_Files, Callable[[], list[Path]]] = {_V1: _version_1, _V2: _version_2}
    for files, parents in finders.items():
        for parent in parents():
            path = parent / f"thintune-{os.getpid()}-{time.monotonic_ns()}"
            try:
                path.mkdir()
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror or error}")
                continue
            if (path / files.limit).exists():
                return files, path
            path.rmdir()
            reasons.append(f"{parent}: its memory controller is not handed down")
    raise LimitNotPermittedError("; ".join(reasons) or "no control group with a memory controller is mounted")


def _version_1() -> list[Path]:
    """Own group of the memory controller."""
    own = _own_group("memory")
    mount = _mount(lambda kind, options: kind == "cgroup" and "memory" in options)
    return [] if own is None or mount is None else [_inside(mount, own)]


def _version_2() -> list[Path]:
    """Own group, if it may hand its memory controller down, and the one above it, if it does so already."""
    own = _own_group("")
    mount = _mount(lambda kind, _options: kind == "cgroup2")
    if own is None or mount is None:
        return []
    here = _inside(mount, own)
    with contextlib.suppress(OSError):  # refused where processes sit in the group itself
        if "memory" in (here / "cgroup.controllers").read_text().split():
            (here / "cgroup.subtree_control").write_text("+memory")
    return [here, here.parent] if here != mount[1] else [here]


def _own_group(controller: str) -> str | None:
    with contextlib.suppress(OSError):
        for line in (_PROC / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                return path
    return None


def _mount(wanted: Callable[[str, list[str]], bool]) -> tuple[str, Path] | None:
    """Root inside the hierarchy and mount point of the first file system that is wanted."""
    with contextlib.suppress(OSError):
        for line in (_PROC / "mountinfo").read_text().splitlines():
            head, _, tail = line.partition(" - ")
            kind, _, options = tail.split(" ", 2)
            if wanted(kind, options.split(",")):
                root, point = head.split()[3:5]
                return root, Path(point)
    return None


def _inside(mount: tuple[str, Path], own: str) -> Path:
    """Folder of the own group; in a container the mount may begin at that group."""
    root, point = mount
    relative = os.path.relpath(own, root)
    return point if relative == "." or relative.startswith("..") else point / relative
