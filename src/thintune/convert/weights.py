"""Dense weights that are in memory only while they are needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from thintune.errors import ConversionError

_RESIDENT_BYTES = 4 << 20
"""Weights of a block that are read once for all its passes; those of a larger block, each time a layer is called.

What is read again and again is one block of the file, which the system's own cache holds where it can.
"""


class WeightSource(Protocol):
    """Where the tensors of a model come from, one at a time."""

    @property
    def names(self) -> Collection[str]:
        """Names in the model of what it holds."""
        ...

    def load(self, name: str) -> Tensor:
        """Reads one tensor into memory of its own."""
        ...


def fill_(model: nn.Module, readers: Mapping[str, Callable[[], Tensor]]) -> None:
    """Replaces tensors of a model, module by module, by what the readers return; what was frozen stays frozen.

    Args:
        model: whose tensors may be on the meta device.
        readers: by the tensor's name in the model.
    """
    modules: dict[str, list[str]] = {}
    for name in readers:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    for owner, names in modules.items():
        values = {name.rpartition(".")[2]: readers[name]() for name in names}
        model.get_submodule(owner).load_state_dict(values, strict=False, assign=True)


class DenseLayers:
    """The layers to convert, whose weights may have to be read before they are used.

    Everything else in the model is read at once and stays: it is part of the thin model.

    Args:
        model: in memory, or on the meta device where it has a source.
        layers: to convert, by name; whoever converts one takes it out.
        source: of the model's tensors, or None for a model in memory.

    Raises:
        ConversionError: a tensor without values that the source does not hold.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Linear], source: WeightSource | None) -> None:
        self.layers = layers
        self._source = source
        lazy = {f"{name}.weight" for name, layer in layers.items() if layer.weight.is_meta}
        empty = {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta}
        held = set() if source is None else set(source.names)
        missing = sorted(empty - held)
        if missing:
            more = f" (and {len(missing) - 3} more)" if len(missing) > 3 else ""
            raise ConversionError(
                f"the model has no values for {', '.join(missing[:3])}{more}; load its weights, or give their source."
            )
        if source is not None:
            fill_(model, {name: partial(source.load, name) for name in sorted(empty - lazy)})

    @property
    def streams(self) -> bool:
        """Whether weights come from a source."""
        return self._source is not None

    @contextlib.contextmanager
    def resident(self, names: Iterable[str] | None = None) -> Iterator[None]:
        """Inside, the weights of some layers have values: all at once where they are few, else while they are called.

        Args:
            names: of the layers, all of them by default; layers that are no longer dense are passed over.
        """
        wanted = [name for name in (self.layers if names is None else names) if name in self.layers]
        lazy = {name: self.layers[name] for name in wanted if self.layers[name].weight.is_meta}
        size = sum(layer.weight.numel() * layer.weight.element_size() for layer in lazy.values())
        if len(lazy) > 1 and size > _RESIDENT_BYTES:
            with self._while_called(lazy):
                yield
            return
        for name, layer in lazy.items():
            self._read(name, layer)
        try:
            yield
        finally:
            for layer in lazy.values():
                _drop(layer)

    @contextlib.contextmanager
    def _while_called(self, lazy: dict[str, nn.Linear]) -> Iterator[None]:
        held: list[nn.Linear] = []

        def let_go(*_: Any) -> None:
            while held:
                _drop(held.pop())

        def hook(name: str) -> Callable[..., None]:
            def before(layer: nn.Linear, _inputs: Any) -> None:
                let_go()  # a pass that ended early left one
                self._read(name, layer)
                held.append(layer)

            return before

        handles = [layer.register_forward_pre_hook(hook(name), prepend=True) for name, layer in lazy.items()]
        handles += [layer.register_forward_hook(let_go) for layer in lazy.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            let_go()

    def keep_rest_(self) -> None:
        """Gives the layers that stay dense their weights for good."""
        for name, layer in self.layers.items():
            if layer.weight.is_meta:
                self._read(name, layer)

    def _read(self, name: str, layer: nn.Linear) -> None:
        assert self._source is not None
        value = self._source.load(f"{name}.weight")
        layer.weight = nn.Parameter(value, requires_grad=layer.weight.requires_grad)


def _drop(layer: nn.Linear) -> None:
    if not layer.weight.is_meta:
        layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=layer.weight.requires_grad)
