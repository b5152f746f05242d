"""What a run writes down about itself, while it runs and at its end."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from thintune.config import RunConfig, to_dict
from thintune.io import write_text
from thintune.measure import median_and_iqr, peak_rss_bytes, provenance
from thintune.records import RunRecord
from thintune.train.loop import Progress

RECORD = "record.json"


def new_record(config: RunConfig, *, resumed: bool) -> RunRecord:
    """The record of a run that begins."""
    train = config.train
    return RunRecord(
        method=config.method,
        model=config.model.name,
        model_options=config.model.options,
        model_checkpoint=config.model.checkpoint,
        dataset=config.data.name,
        image_size=config.data.image_size,
        seed=train.seed,
        optimizer=train.optimizer,
        learning_rate=train.learning_rate,
        batch_size=train.batch_size,
        micro_batch=train.micro_batch or train.batch_size,
        epochs=train.epochs,
        explained_variance=config.thin.explained_variance,
        resumed=resumed,
        threads=torch.get_num_threads(),
        device=config.device,
        versions=provenance.versions(),
        command=provenance.command(),
        date=provenance.date(),
        git_commit=provenance.git_commit(),
        config=to_dict(config),
    )


def note_progress(record: RunRecord, progress: Progress) -> None:
    """Takes over what the steps measured."""
    record.steps = progress.step
    losses = progress.epoch_losses
    record.train_loss = sum(losses) / len(losses) if losses else None
    record.saved_activation_bytes = progress.saved_activation_bytes
    record.train_flops_per_step = progress.flops_per_step
    record.step_time_s_median, record.step_time_s_iqr = median_and_iqr(progress.step_times_s)
    if record.step_time_s_median:
        record.images_per_s = record.batch_size / record.step_time_s_median
    peak, baseline = peak_rss_bytes(), record.baseline_rss_bytes
    if peak is not None and baseline is not None:
        record.train_peak_above_baseline_bytes = peak - baseline


def write_record(record: RunRecord, out: Path, began: float) -> None:
    """Writes `record.json`, with the peak of the process and its duration since `began` (time.perf_counter)."""
    record.peak_rss_bytes = peak_rss_bytes()
    if record.peak_rss_bytes is not None and record.baseline_rss_bytes is not None:
        record.peak_rss_bytes = max(record.peak_rss_bytes, record.baseline_rss_bytes)
        record.peak_above_baseline_bytes = record.peak_rss_bytes - record.baseline_rss_bytes
    record.duration_s = round(time.perf_counter() - began, 3)
    write_text(out / RECORD, record.to_json())
