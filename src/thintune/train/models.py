"""Models by name, built without holding a weight twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from thintune.config import ModelConfig
from thintune.convert.weights import fill_
from thintune.errors import ConfigError, MissingDependencyError, nearest
from thintune.train.dense import DenseWeights


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
        empty: leave every parameter on the meta device, to be filled from a thin checkpoint.

    Raises:
        ConfigError: unknown model or option.
        CheckpointError: weights that are missing, damaged, or of another architecture.
    """
    if config.checkpoint is None and not empty:
        return _create(config, classes, image_size)
    if empty:
        return _skeleton(config, classes, image_size)
    model, source = open_model(config, classes, image_size)
    fill_(model, source.readers())
    return model


def open_model(
    config: ModelConfig, classes: int, image_size: int, *, keep_head: bool = False
) -> tuple[nn.Module, DenseWeights]:
    """Builds a model whose parameters stay in the file of dense weights until they are read; its head is zero.

    Args:
        config: names the file.
        classes: outputs of the head.
        image_size: of the square input, in pixels.
        keep_head: leave the file's head to be read too, where it has as many classes.

    Raises:
        ConfigError: unknown model or option.
        CheckpointError: weights that are missing, damaged, or of another architecture.
    """
    assert config.checkpoint is not None
    model = _skeleton(config, classes, image_size)
    head = classifier_name(model)
    source = DenseWeights(Path(config.checkpoint), model, head, keep_head=keep_head)
    if f"{head}.weight" not in source.names:
        start_head_(model)
    return model, source


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


class _NoValues(TorchFunctionMode):
    """Lets nothing be written into parameters: memory that is never touched is never resident."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        name = getattr(func, "__name__", "")
        writes = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if writes and isinstance(target, nn.Parameter):
            return target
        return func(*args, **kwargs)


def _skeleton(config: ModelConfig, classes: int, image_size: int) -> nn.Module:
    """The model with its parameters on the meta device; buffers have the values that the model computes for them."""
    with _NoValues():
        model = _create(dataclasses.replace(config, pretrained=False), classes, image_size)
    empty: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            made = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            setattr(module, name, empty.setdefault(id(parameter), made))
    return model


def start_head_(model: nn.Module) -> None:
    """Sets a head that has no values yet to zero."""
    head = model.get_submodule(classifier_name(model))
    for name, parameter in list(head.named_parameters()):
        if parameter.is_meta:
            zeros = torch.zeros_like(parameter, device="cpu")
            setattr(head, name, nn.Parameter(zeros, requires_grad=parameter.requires_grad))
