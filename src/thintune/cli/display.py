"""What the terminal shows during and after a run."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from thintune.records import RunRecord
from thintune.train.loop import Progress as Steps


class RichDisplay:
    """A progress bar on a terminal; a line every tenth of the run elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._bar: Progress | None = None
        self._steps = 0

    def say(self, text: str) -> None:
        """Prints lines."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, steps: int, done: int) -> None:
        """Opens the bar."""
        self._steps = steps
        if self.console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("training", total=steps, completed=done, loss="-")

    def step(self, progress: Steps) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.step, loss=f"{progress.loss:.4f}")
        elif progress.step % max(1, self._steps // 10) == 0 or progress.step == self._steps:
            self.say(f"step {progress.step}/{self._steps} loss {progress.loss:.4f}")

    def stop(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def summary(self, record: RunRecord, out: Path) -> None:
        """Prints the figures a reader looks for first."""
        table = Table(title=f"{record.method} on {record.dataset}, {out}/record.json", title_justify="left")
        for heading in ("test accuracy", "peak above baseline", "step", "checkpoint", "inference", "kept weights"):
            table.add_column(heading, justify="right")
        table.add_row(*summary_cells(record))
        Console().print(table)


def summary_cells(record: RunRecord) -> list[str]:
    """Test accuracy, peak, step time, checkpoint size, inference speed and kept weights, as text."""
    return [
        _show(record.test_accuracy, "{:.4f}"),
        _show(record.peak_above_baseline_bytes, "{:.0f} MB", 1e6),
        _show(record.step_time_s_median, "{:.3f} s"),
        _show(record.checkpoint_bytes, "{:.2f} MB", 1e6),
        _show(record.inference_images_per_s, "{:.0f} images/s"),
        _show(record.kept_weight_fraction, "{:.3f}"),
    ]


def _show(value: float | None, pattern: str, unit: float = 1.0) -> str:
    return "not measured" if value is None else pattern.format(value / unit)
