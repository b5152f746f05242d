"""From dense weights to a thin checkpoint, without the dense model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from thintune.config import RunConfig, to_dict
from thintune.convert import ConversionReport, convert_
from thintune.errors import CheckpointError, ConfigError
from thintune.io import prepare_directory, save_checkpoint
from thintune.measure import peak_rss_bytes, release_free_memory, rss_bytes
from thintune.ops import without_kernels
from thintune.train.models import build_model, classifier_name, open_model
from thintune.train.prepare import calibration_batches, check_device, import_libraries, load_data, without_head

_HOLDS = ("checkpoint.json", "checkpoint", "state")


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion left, and what it took. Memory is None where the system does not tell it."""

    report: ConversionReport
    checkpoint_bytes: int
    calibration_images: int
    streamed: bool
    """Whether matrices were read one by one; False for downloaded weights and for files that timm has to rewrite."""
    data_bytes: int | None
    """Resident memory of the data set, above the imported libraries."""
    peak_above_baseline_bytes: int | None
    """High-water mark of the process above the imported libraries, the data set included."""


@without_kernels()  # a pass or two over few images are not worth their memory
def convert_checkpoint(config: RunConfig, out: Path, *, overwrite: bool = False) -> ConversionResult:
    """Converts the dense weights that the configuration names and writes a thin checkpoint.

    Args:
        config: its model, data, thin and device parts; train.micro_batch images run at a time.
        out: folder of the checkpoint.
        overwrite: replace a checkpoint in `out`.

    Raises:
        ThintuneError: whatever went wrong; an older checkpoint is as it was.
    """
    check_device(config.device)
    _check(config, out, overwrite)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    import_libraries(config)
    baseline = rss_bytes()
    splits = load_data(config.model, config.data)
    release_free_memory()
    with_data = rss_bytes()
    prepare_directory(out)
    torch.manual_seed(config.train.seed)
    source = None
    if config.model.checkpoint is None:
        model = build_model(config.model, splits.classes, config.data.image_size)
    else:
        model, source = open_model(config.model, splits.classes, config.data.image_size, keep_head=True)
    batches = calibration_batches(config, splits.train)
    thin = without_head(config.thin, classifier_name(model))
    report = convert_(model, thin, calibration=batches, source=source)
    images = min(config.thin.calibration_images, len(splits.train))
    info = {
        "config": to_dict(config),
        "classes": splits.classes,
        "batch_size": config.train.micro_batch or config.train.batch_size,
        "kept_weight_fraction": report.kept_weight_fraction,
        "calibration_images": images,
    }
    saved = save_checkpoint(model, out, info)
    peak = peak_rss_bytes()
    return ConversionResult(
        report,
        saved.size_bytes,
        images,
        source is not None and source.streams,
        None if baseline is None or with_data is None else with_data - baseline,
        None if baseline is None or peak is None else peak - baseline,
    )


def _check(config: RunConfig, out: Path, overwrite: bool) -> None:
    if config.model.checkpoint is None and not config.model.pretrained:
        raise ConfigError("model: expected dense weights to convert; give model.checkpoint, or set model.pretrained.")
    if config.model.checkpoint is not None and Path(config.model.checkpoint).is_dir():
        raise CheckpointError(
            f"model.checkpoint: {config.model.checkpoint}: expected a safetensors file of dense weights, got a folder."
        )
    if config.device != "cpu":
        raise ConfigError(f"device: converting to a checkpoint runs on the CPU, got {config.device!r}.")
    if not overwrite and any((out / name).exists() for name in _HOLDS):
        raise ConfigError(f"{out}: holds a checkpoint or a run already; use --overwrite or another --out.")
