"""From a configuration to a model that is ready to train."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thintune.config import DataConfig, ModelConfig, RunConfig, ThinConfig, TrainConfig
from thintune.convert import ConversionReport, convert_, make_trainable_
from thintune.convert.dense_to_thin import CONVERTIBLE
from thintune.convert.selection import matches, select
from thintune.convert.structure import rebuild_
from thintune.data import Normalization, Split, Splits, load_splits
from thintune.errors import ConfigError
from thintune.measure import return_freed_blocks
from thintune.ops import limit_kernels
from thintune.planning.perplexity import perplexity_table, plan_activations
from thintune.train.adapters import count_adapters
from thintune.train.methods import import_for, prepare_
from thintune.train.models import build_model, classifier_name, import_timm, open_model
from thintune.train.thin_start import load_thin, thin_folder


def import_libraries(config: RunConfig) -> None:
    """Imports what the run will need, so that the memory baseline counts it."""
    import_timm()
    importlib.import_module("torch.utils.flop_counter")
    if config.data.name == "digits":
        with contextlib.suppress(ImportError):  # the reader of the data reports it
            importlib.import_module("sklearn.datasets")
    elif config.data.name not in ("fashion-mnist", "folder", "synthetic"):
        with contextlib.suppress(ImportError):
            importlib.import_module("torchvision.datasets")
    import_for(config)


def check_device(device: str) -> None:
    """Raises ConfigError where the device is not there."""
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"device: {device!r} asked for, but torch finds no CUDA device; use --device cpu.")


def normalization(config: ModelConfig) -> Normalization:
    """Mean and standard deviation that the model was pre-trained with; 0.5 where timm knows none."""
    known = import_timm().get_pretrained_cfg(config.name.removeprefix("timm:"), allow_unregistered=True)
    if known is None or not known.mean:
        return Normalization((0.5,) * 3, (0.5,) * 3)
    return Normalization(tuple(known.mean), tuple(known.std))


def load_data(model: ModelConfig, data: DataConfig) -> Splits:
    """Reads the data as the model wants it."""
    return load_splits(data, normalization(model))


def build(config: RunConfig, splits: Splits) -> tuple[nn.Module, ConversionReport | None]:
    """Builds the model and applies the method.

    Returns:
        The model, and what the conversion did, or None for a method that converts nothing.
    """
    _set_memory_policy(config.train)
    torch.manual_seed(config.train.seed)
    folder = thin_folder(config)
    if folder is not None:
        model = load_thin(config, folder, splits.classes).to(config.device)
        batches = calibration_batches(config, splits.train)
        return model, make_trainable_(model, config.thin, calibration=batches, seed=config.train.seed)
    source = None
    if config.method == "thin" and config.model.checkpoint is not None and config.device == "cpu":
        model, source = open_model(config.model, splits.classes, config.data.image_size)
    else:
        model = build_model(config.model, splits.classes, config.data.image_size).to(config.device)
    head = classifier_name(model)
    if config.method not in CONVERTIBLE:
        prepare_(model, config, head)
        return model, None
    thin = without_head(config.thin, head)
    batches = calibration_batches(config, splits.train)
    ranks = None
    if thin.activation_budget_bytes is not None and config.method in ("asi", "wasi"):
        layers, _ = select(model, thin)
        ranks = plan_activations(perplexity_table(model, layers, batches[0]), thin.activation_budget_bytes)
    report = convert_(model, thin, method=config.method, calibration=batches, activation_ranks=ranks, source=source)
    prepare_(model, config, head)
    return model, count_adapters(report, model)


def _set_memory_policy(config: TrainConfig) -> None:
    """What holds for the whole process; a run that is taken up needs the same for the same bits."""
    if config.layerwise_update:
        return_freed_blocks()
    limit_kernels(None if config.layerwise_update and config.reuse_memory else 0)


def without_head(thin: ThinConfig, head: str) -> ThinConfig:
    """The head stays dense: it is small, and starts anew."""
    if any(matches(head, p) for p in thin.exclude_modules):
        return thin
    return dataclasses.replace(thin, exclude_modules=(*thin.exclude_modules, head))


class CalibrationImages(Sequence[Tensor]):
    """Batches of the first images of a split, each made when it is asked for.

    Args:
        split: unlabelled images are taken from it.
        count: of images.
        size: of a batch.
        device: on which batches are put.
    """

    def __init__(self, split: Split, count: int, size: int, device: str) -> None:
        self._split, self._device = split, device
        self._rows = torch.arange(count).split(size)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._split.images(self._rows[index]).to(self._device)


def calibration_batches(config: RunConfig, split: Split) -> CalibrationImages:
    """Unlabelled training images: one micro-batch for Tucker ranks, `calibration_images` for `thin` and `svd_lora`."""
    size = config.train.micro_batch or config.train.batch_size
    count = min(config.thin.calibration_images, len(split))
    if config.method in ("asi", "wasi"):
        count = size = min(size, len(split))
    size = min(size, 32) if config.method in ("thin", "svd_lora") else size
    return CalibrationImages(split, count, size, config.device)


def rebuild(config: RunConfig, classes: int, layers: dict[str, dict[str, Any]]) -> nn.Module:
    """The model of an interrupted run, its parameters without values (on the meta device): the saved state has them."""
    _set_memory_policy(config.train)
    source = dataclasses.replace(config.model, checkpoint=None, pretrained=False)
    model = build_model(source, classes, config.data.image_size, empty=True)
    rebuild_(model, layers)
    prepare_(model, config, classifier_name(model))
    return model
