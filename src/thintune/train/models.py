"""Models by name, built without holding a weight twice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thintune.config import ModelConfig
from thintune.errors import CheckpointError, ConfigError, MissingDependencyError, nearest
from thintune.io.checkpoint import check_shapes, meta_tensors


def import_timm() -> Any:
    """Imports timm.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise MissingDependencyError("timm is not installed; run: pip install 'thintune[vision]'") from error
    return timm


def build_model(config: ModelConfig, classes: int, image_size: int, *, empty: bool = False) -> nn.Module:
    """Builds a timm model with a fresh head.

    Args:
        config: name, options and source of the weights.
        classes: outputs of the head.
        image_size: of the square input, in pixels; positional tables are resampled.
        empty: leave every tensor on the meta device, to be filled from a thin checkpoint.

    Raises:
        ConfigError: unknown model or option.
        CheckpointError: weights that are missing, damaged, or of another architecture.
    """
    if empty:
        with torch.device("meta"):
            return _create(config, classes, image_size)
    if config.checkpoint is None:
        return _create(config, classes, image_size)
    with torch.device("meta"):
        model = _create(config, classes, image_size)
    _load_dense_(model, Path(config.checkpoint))
    return model


def classifier_name(model: nn.Module) -> str:
    """Name of the head inside the model.

    Raises:
        ConfigError: the model has no single linear head.
    """
    getter = getattr(model, "get_classifier", None)
    head = getter() if getter else None
    for name, module in model.named_modules():
        if module is head and isinstance(module, nn.Linear):
            return name
    raise ConfigError(f"{type(model).__name__}: expected a model with one linear head, as ViT, DeiT and Swin have.")


def _create(config: ModelConfig, classes: int, image_size: int) -> nn.Module:
    timm = import_timm()
    name = config.name.removeprefix("timm:")
    if not timm.is_model(name.split(".")[0]):
        raise ConfigError(f"model.name: timm has no model {name!r}.{nearest(name, timm.list_models())}")
    if "img_size" in config.options:
        raise ConfigError("model.options: img_size is set by data.image_size; leave it out.")
    options = {"img_size": image_size, **config.options}
    try:
        try:
            model = timm.create_model(name, pretrained=config.pretrained, num_classes=classes, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            model = timm.create_model(name, pretrained=config.pretrained, num_classes=classes, **config.options)
    except TypeError as error:
        raise ConfigError(f"model.options: timm's {name} does not take them: {error}.") from error
    except (AssertionError, ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"model {name}: could not be built with {options}: {_first_line(error)}") from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if isinstance(patch, tuple) and image_size < max(patch):
        raise ConfigError(f"data.image_size: expected at least one patch of the model {patch}, got {image_size}.")
    return model


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _load_dense_(model: nn.Module, path: Path) -> None:
    """Fills a model on the meta device from a safetensors file; only the head may be missing."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"model.checkpoint: {path}: expected a safetensors file, found nothing of that name.")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"model.checkpoint: {path}: truncated or no safetensors file: {_first_line(error)}."
        ) from error
    head = classifier_name(model)
    resample = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if resample is not None:
        state = resample(state, model)
    state = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] != head}
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items() if n.rpartition(".")[0] != head}
    check_shapes(f"model.checkpoint: {path}", expected, state)
    model.load_state_dict(state, strict=False, assign=True)
    classifier = model.get_submodule(head)
    classifier.to_empty(device="cpu")
    assert isinstance(classifier, nn.Linear)
    nn.init.zeros_(classifier.weight)
    if classifier.bias is not None:
        nn.init.zeros_(classifier.bias)
    left = meta_tensors(model)
    if left:
        raise CheckpointError(f"model.checkpoint: {path}: has no values for {', '.join(left[:3])}.")
