"""One training run, from configuration to record."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn

from thintune.config import RunConfig, to_dict
from thintune.convert import ConversionReport
from thintune.data import Splits
from thintune.errors import ConfigError, DataError, DivergenceError, ThintuneError
from thintune.io import prepare_directory, save_checkpoint
from thintune.measure import release_free_memory, rss_bytes
from thintune.ops import release_buffers
from thintune.optim import ThinStep
from thintune.records import RunRecord
from thintune.train.evaluate import evaluate
from thintune.train.head import fit_head_
from thintune.train.loop import Loop, Progress
from thintune.train.methods import finish_, make_optimizer
from thintune.train.models import classifier_name
from thintune.train.prepare import build, check_device, import_libraries, load_data, rebuild
from thintune.train.recording import new_record, note_progress, write_record
from thintune.train.state import SavedState, save_state
from thintune.train.subspaces import SubspaceTracker

STATE, CHECKPOINT = "state", "checkpoint"


class Display(Protocol):
    """What a run tells while it runs."""

    def say(self, text: str) -> None:
        """One line."""

    def start(self, steps: int, done: int) -> None:
        """The steps begin."""

    def step(self, progress: Progress) -> None:
        """A step is done."""

    def stop(self) -> None:
        """The steps are over."""


class Silent:
    """Tells nothing."""

    def say(self, text: str) -> None:
        """One line."""

    def start(self, steps: int, done: int) -> None:
        """The steps begin."""

    def step(self, progress: Progress) -> None:
        """A step is done."""

    def stop(self) -> None:
        """The steps are over."""


def train(
    config: RunConfig, out: Path, *, resume: bool = False, overwrite: bool = False, display: Display | None = None
) -> RunRecord:
    """Trains a model and leaves `record.json`, a checkpoint and, on the way, a resumable state in `out`.

    Args:
        config: of the run; with `resume`, the one the state was saved with.
        out: folder of the run.
        resume: take up the state in `out`.
        overwrite: replace an earlier run in `out`.
        display: told about progress.

    Returns:
        The record, its status `completed` or `interrupted`.

    Raises:
        ThintuneError: whatever went wrong; a record of status `failed` is left if the run had begun.
    """
    check_device(config.device)
    if not (resume or overwrite) and any((out / name).exists() for name in (STATE, CHECKPOINT)):
        raise ConfigError(f"{out}: holds a run already; use --resume, --overwrite or another --out.")
    return _Run(config, out, resume, display or Silent()).execute()


class _Run:
    def __init__(self, config: RunConfig, out: Path, resume: bool, display: Display) -> None:
        self.config, self.out, self.display = config, out, display
        self.state = SavedState(out / STATE) if resume else None
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.began = time.perf_counter()
        self.stopped = False
        self.record = new_record(config, resumed=resume)

    def execute(self) -> RunRecord:
        release_buffers()  # of an earlier run in this process, which would count as saved activations of this one
        import_libraries(self.config)
        self.record.baseline_rss_bytes = rss_bytes()
        splits = load_data(self.config.model, self.config.data)
        if not len(splits.train):
            raise DataError(f"{self.config.data.name}: no training images are left; lower data.val_fraction.")
        prepare_directory(self.out)
        self.record.train_images = len(splits.train)
        try:
            with _on_signal(self._stop):
                self._execute(splits)
        except KeyboardInterrupt:
            self.record.status = "interrupted"
        except Exception as error:
            kind = "" if isinstance(error, ThintuneError) else f"{type(error).__name__}: "
            self.record.status, self.record.error = "failed", f"{kind}{error}"
            self.record.diverged = isinstance(error, DivergenceError)
            with contextlib.suppress(ThintuneError):
                write_record(self.record, self.out, self.began)
            raise
        write_record(self.record, self.out, self.began)
        return self.record

    def _stop(self) -> None:
        """A first signal ends the run after the current step; before the steps there is nothing to save."""
        if self.stopped or not self.stepping:
            raise KeyboardInterrupt
        self.stopped = True

    stepping = False

    def _execute(self, splits: Splits) -> None:
        config = self.config
        model = self._fresh_model(splits) if self.state is None else self._saved_model(splits, self.state)
        optimizer = make_optimizer(model, config)
        thin = config.thin
        thin_step = ThinStep(model, optimizer, refresh_every=thin.refresh_every, update_scale=thin.update_scale)
        loop = Loop(model, optimizer, thin_step, splits.train, config.train, config.device)
        if self.state is not None:
            loop.progress.step = int(self.state.document["step"])
            loop.progress.epoch_losses = list(self.state.document["epoch_losses"])
            thin_step.restore_(loop.progress.step)
            self.state.restore_optimizer_(model, optimizer)
            self.state = None
        else:
            torch.manual_seed(config.train.seed)
        self.record.parameter_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.record.prepare_time_s = round(time.perf_counter() - self.began, 3)
        release_free_memory()
        try:
            finished = self._steps(loop, model, optimizer)
        finally:
            note_progress(self.record, loop.progress)
        if not finished:
            self.record.status = "interrupted"
            return
        self._finish(model, splits)

    def _fresh_model(self, splits: Splits) -> nn.Module:
        config = self.config
        model, report = build(config, splits)
        self._note_conversion(report)
        release_free_memory()
        if config.train.fit_head:
            head = model.get_submodule(classifier_name(model))
            assert isinstance(head, nn.Linear)
            size = min(config.train.micro_batch or config.train.batch_size, 32)
            fit_head_(model, head, splits.train, size, config.device)
            self.record.head_val_accuracy = evaluate(model, splits.val, size, config.device).accuracy
            self.display.say(f"head fitted: validation accuracy {self.record.head_val_accuracy}")
        return model

    def _saved_model(self, splits: Splits, state: SavedState) -> nn.Module:
        document = state.document
        model = rebuild(self.config, splits.classes, document["layers"])
        state.restore_model_(model)
        model.to(self.config.device)
        self.record.kept_weight_fraction = document["kept_weight_fraction"]
        self.record.head_val_accuracy = document["head_val_accuracy"]
        self.display.say(f"resumed after step {document['step']}")
        return model

    def _note_conversion(self, report: ConversionReport | None) -> None:
        self.record.kept_weight_fraction = 1.0 if report is None else report.kept_weight_fraction
        if report is not None:
            self.display.say(str(report))

    def _steps(self, loop: Loop, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        every = self.config.train.checkpoint_every
        tracker = None
        if self.config.train.track_subspaces:
            done = loop.progress.step // loop.steps_per_epoch if self.record.resumed else None
            tracker = SubspaceTracker(model, self.out, done)

        def save() -> None:
            progress = {
                "step": loop.progress.step,
                "epoch_losses": loop.progress.epoch_losses,
                "kept_weight_fraction": self.record.kept_weight_fraction,
                "head_val_accuracy": self.record.head_val_accuracy,
            }
            save_state(self.out / STATE, model, optimizer, self.config, progress)

        def after_step(progress: Progress) -> bool:
            self.display.step(progress)
            if tracker is not None and (progress.step % loop.steps_per_epoch == 0 or progress.step == loop.steps):
                tracker.observe(math.ceil(progress.step / loop.steps_per_epoch))
            stopping = self.stopped  # asked once: a signal from here on waits for the next step
            if stopping or (every and progress.step % every == 0):
                save()
            return not stopping

        self.display.start(loop.steps, loop.progress.step)
        self.stepping = True
        try:
            if every and loop.progress.step == 0:
                save()
            elif not (every or self.record.resumed):
                shutil.rmtree(self.out / STATE, ignore_errors=True)  # an overwritten run must not be taken up
            return loop.run(after_step)
        finally:
            self.stepping = False
            self.display.stop()

    def _finish(self, model: nn.Module, splits: Splits) -> None:
        config = self.config
        finish_(model, config)
        size = min(config.train.micro_batch or config.train.batch_size, 32)
        self.record.val_accuracy = evaluate(model, splits.val, size, config.device).accuracy
        info = {"config": to_dict(config), "classes": splits.classes, "batch_size": size}
        if config.train.evaluate_test:
            tested = evaluate(model, splits.test, size, config.device)
            self.record.test_accuracy = info["test_accuracy"] = tested.accuracy
            self.record.inference_images_per_s = tested.images_per_s
        self.record.checkpoint_bytes = save_checkpoint(model, self.out / CHECKPOINT, info).size_bytes
        self.record.status = "completed"


@contextlib.contextmanager
def _on_signal(stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` on SIGINT and SIGTERM, in the main thread only."""

    def handler(_number: int, _frame: FrameType | None) -> None:
        stop()

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handler)
    except ValueError:  # not in the main thread: leave signals to the caller
        before = {}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
