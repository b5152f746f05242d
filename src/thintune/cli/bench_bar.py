"""What the terminal shows while a bench runs."""

from __future__ import annotations

import datetime

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class BenchBar:
    """A bar with the time left on a terminal; a line a process elsewhere."""

    def __init__(self, name: str) -> None:
        self.console = Console(stderr=True)
        self._name = name
        self._bar: Progress | None = None
        self._done = self._total = 0

    def say(self, text: str) -> None:
        """Prints lines."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, total: int, done: int) -> None:
        """Opens the bar."""
        self._total, self._done = total, done
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
            )
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=total, completed=done, left="")

    def begin(self, name: str) -> None:
        """Names what runs."""
        if self._bar is not None:
            self._bar.update(self._task, description=name)

    def ended(self, text: str, left_s: float | None, total: int | None = None) -> None:
        """Says how a process ended, and how long the others may take."""
        self._done += 1
        self._total = self._total if total is None else total
        left = "" if left_s is None else f"about {datetime.timedelta(seconds=round(left_s))} left"
        self.say(f"{self._done}/{self._total} {text}{'; ' + left if left and self._bar is None else ''}")
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, total=self._total, left=left)

    def stop(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
