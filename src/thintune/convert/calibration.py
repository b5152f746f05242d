"""One pass over unlabelled inputs: the moments and the shapes that the layers see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thintune.errors import ConversionError


class Enough(Exception):  # noqa: N818 - ends a forward pass early, not an error
    """Raised inside a forward pass once the last observed layer has been reached."""


@dataclass
class Call:
    """Arguments of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Moments:
    """First and second moments of one layer's input, summed over rows.

    Args:
        total: (I,) sum of x.
        outer: (I, I) sum of x x.T.
        count: rows seen.
    """

    total: Tensor
    outer: Tensor
    count: int = 0

    @classmethod
    def empty(cls, features: int, like: Tensor) -> Moments:
        """Moments of nothing."""
        kind = {"device": like.device, "dtype": like.dtype}
        return cls(torch.zeros(features, **kind), torch.zeros(features, features, **kind))

    def add(self, x: Tensor) -> None:
        """Adds the rows of (..., I)."""
        rows = x.reshape(-1, x.shape[-1])
        self.total += rows.sum(0)
        self.outer.addmm_(rows.T, rows)
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        """(I,) E[x]."""
        return self.total / self.count

    @property
    def second(self) -> Tensor:
        """(I, I) E[x x.T]."""
        return self.outer / self.count

    @property
    def covariance(self) -> Tensor:
        """(I, I) E[x x.T] - E[x] E[x].T."""
        return self.second - torch.outer(self.mean, self.mean)


def checked_batches(calibration: Iterable[Any] | None) -> Sequence[Any]:
    """The calibration batches, for several passes: a sequence as it is, which may make its batches when asked.

    Raises:
        ConversionError: none given, an empty iterable, or a tensor that is no list of batches.
    """
    if isinstance(calibration, Tensor):
        raise ConversionError("calibration: expected a list of batches, got one tensor; pass calibration=[images].")
    batches = calibration if isinstance(calibration, Sequence) else list(() if calibration is None else calibration)
    if not len(batches):
        raise ConversionError(
            "calibration: expected at least one batch of inputs, got none; pass calibration=[images, ...] "
            "(labels are not needed)."
        )
    return batches


def run(model: nn.Module, batch: Any) -> None:
    """One forward pass; a call, a tuple or a dict is unpacked into arguments."""
    if isinstance(batch, Call):
        model(*batch.args, **batch.kwargs)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode and records no gradients; it gets its modes back, module by module."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def observe(
    model: nn.Module, layers: dict[str, nn.Module], batches: Sequence[Any], visit: Callable[[str, Tensor], None]
) -> None:
    """Calls `visit(name, input)` for every call of the layers; stops each pass once all of them were called.

    The model runs in evaluation mode without gradients and gets its modes back.
    """
    missing: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not inputs:
                raise ConversionError(f"{name}: expected a call as layer(x), got one by keyword; exclude the layer.")
            visit(name, inputs[0].detach())
            missing.discard(name)
            if not missing:
                raise Enough

        return before

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            for batch in batches:
                missing = set(layers)
                try:
                    run(model, batch)
                except Enough:
                    continue
    finally:
        for handle in handles:
            handle.remove()


def moments(model: nn.Module, layers: dict[str, nn.Linear], batches: Sequence[Any]) -> dict[str, Moments]:
    """Moments of the inputs of the given layers; a layer that is never called is missing from the result."""
    seen: dict[str, Moments] = {}

    def visit(name: str, x: Tensor) -> None:
        if name not in seen:
            seen[name] = Moments.empty(x.shape[-1], x)
        seen[name].add(x)

    observe(model, dict(layers), batches, visit)
    return {name: found for name, found in seen.items() if found.count}


def rows_seen(model: nn.Module, layers: Mapping[str, nn.Linear], batches: Sequence[Any]) -> dict[str, int]:
    """Rows that each layer's input has over all batches; a layer that is never called is missing."""
    rows: dict[str, int] = {}

    def visit(name: str, x: Tensor) -> None:
        rows[name] = rows.get(name, 0) + x[..., 0].numel()

    observe(model, dict(layers), batches, visit)
    return rows


def groups(layers: dict[str, nn.Linear], limit_bytes: int = 32 << 20) -> Iterator[dict[str, nn.Linear]]:
    """Cuts the layers, in order, into runs whose second moments fit in `limit_bytes` (at least one layer each)."""
    group: dict[str, nn.Linear] = {}
    size = 0
    for name, layer in layers.items():
        need = layer.in_features**2 * layer.weight.element_size()
        if group and size + need > limit_bytes:
            yield group
            group, size = {}, 0
        group[name] = layer
        size += need
    yield group


def block_of(name: str) -> str:
    """A layer's name up to its first number, `blocks.3`; the whole name where it has none."""
    parts = name.split(".")
    digits = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: digits[0] + 1]) if digits else name


def blocks(layers: dict[str, nn.Linear]) -> Iterator[dict[str, nn.Linear]]:
    """Cuts the layers, in order, into runs that share a block."""
    group: dict[str, nn.Linear] = {}
    current: str | None = None
    for name, layer in layers.items():
        key = block_of(name)
        if group and key != current:
            yield group
            group = {}
        group[name], current = layer, key
    if group:
        yield group
