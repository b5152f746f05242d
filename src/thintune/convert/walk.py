"""From block to block: what enters each of them, computed once and kept between them.

Most transformers are a chain: each block takes what the one before it returned. There the calibration inputs of a
block are held in one buffer, cut as the calibration batches are, and every block moves it on in place. Whatever is no
chain is observed in passes of the whole model, each up to the last layer that is asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from thintune.convert.calibration import Call, Enough, Moments, block_of, blocks, evaluating, groups, moments, run
from thintune.convert.weights import DenseLayers
from thintune.measure import release_free_memory


def chains(model: nn.Module, layers: DenseLayers, batch: Any) -> dict[str, list[str]]:
    """Finds the containers whose children run as a chain, by one pass of one batch.

    A chain's children are called once each, in order, on a tensor that is the very one the child before returned, with
    the same further arguments; none changes its input.

    Args:
        model: any module.
        layers: their names say which containers come into question.
        batch: inputs of the model.

    Returns:
        Names of the children by name of the container.
    """
    parents = dict.fromkeys(key.rpartition(".")[0] for name in layers.layers if (key := block_of(name)) != name)
    parents |= dict.fromkeys(name.rpartition(".")[0] for name in layers.layers if name.rpartition(".")[2].isdigit())
    tracks: dict[str, _Track] = {}
    for parent in parents:
        container = model.get_submodule(parent)
        children = [name for name, _ in container.named_children()]
        if isinstance(container, nn.Sequential | nn.ModuleList) and len(children) > 1:
            tracks[parent] = _Track([f"{parent}.{child}" if parent else child for child in children])
    if not tracks:
        return {}
    handles: list[Any] = []
    for track in tracks.values():
        for index, name in enumerate(track.names):
            block = model.get_submodule(name)
            handles.append(block.register_forward_pre_hook(track.before(index), with_kwargs=True))
            handles.append(block.register_forward_hook(track.after, with_kwargs=True))
    try:
        with layers.resident(), evaluating(model):
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {parent: track.names for parent, track in tracks.items() if track.holds}


@dataclass
class _Track:
    """Watches the children of one container during a pass."""

    names: list[str]
    broken: bool = False
    calls: int = 0
    output: tuple[Any, int] | None = None
    further: tuple[Any, ...] | None = None
    entered: int = 0

    @property
    def holds(self) -> bool:
        return not self.broken and self.calls == len(self.names)

    def before(self, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            further = (*args[1:], *(item for key in sorted(kwargs) for item in (key, kwargs[key])))
            given = args[0] if args else None
            if index != self.calls or not isinstance(given, Tensor):
                self.broken = True
            elif self.output is not None:
                previous, version = self.output
                self.broken |= given is not previous or given._version != version
                self.broken |= not _same(further, self.further)
            self.further = further
            self.entered = given._version if isinstance(given, Tensor) else 0

        return hook

    def after(self, _module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        self.calls += 1
        if not args or not isinstance(output, Tensor) or args[0]._version != self.entered:
            self.broken, self.output = True, None
            return
        self.output = (output, output._version)


def _same(one: tuple[Any, ...], other: tuple[Any, ...] | None) -> bool:
    if other is None or len(one) != len(other):
        return False
    return all(
        a is b or (not isinstance(a, Tensor) and type(a) is type(b) and a == b) for a, b in zip(one, other, strict=True)
    )


Amend = Callable[[nn.Module, Sequence[Call], Sequence[Tensor]], object]


@dataclass
class _Buffer:
    """What enters one block of a chain, batch by batch."""

    parent: str
    names: list[str]
    position: int = 0
    calls: list[Call] = field(default_factory=list)
    dense: list[Call] = field(default_factory=list)
    """The same on the path of the blocks before any was changed, up to `dense_position`, where that is wanted."""
    dense_position: int = 0


class Walk:
    """Visits the layers block by block and hands out the moments of their inputs.

    Args:
        model: holds the layers.
        layers: to visit.
        batches: calibration inputs of the model.
    """

    def __init__(self, model: nn.Module, layers: DenseLayers, batches: Sequence[Any]) -> None:
        self._model, self._layers, self._batches = model, layers, batches
        self.chains = chains(model, layers, batches[0])
        """Names of the blocks by name of their container, where they run as a chain."""
        self._parents = {name: parent for parent, names in self.chains.items() for name in names}

    def moments(self, names: Sequence[str], amend_: Amend | None = None) -> Iterator[tuple[str, Moments]]:
        """Moments of the layers' inputs, in order, as the model is at that time.

        A layer may be replaced while it is at hand; the blocks after it see what it has become. Moments belong to the
        caller; a layer that is never called has none.

        Args:
            names: of the layers.
            amend_: called with each block of a chain once its layers have been visited, with what enters it and with
                what it returned before, fed by the blocks before it as they were. Takes a second buffer.
        """
        buffer: _Buffer | None = None
        plan = [list(block) for block in blocks({name: self._layers.layers[name] for name in names})]
        for block in plan:
            key = block_of(block[0])
            parent = self._parents.get(key)
            if parent is None:
                buffer = None
                yield from self._of_group(self._model, block, self._batches, None)
                continue
            if buffer is None or buffer.parent != parent:
                buffer = None  # its memory first
                buffer = self._enter(parent)
            while buffer.names[buffer.position] != key:
                self._advance(buffer)
            if amend_ is not None:
                self._advance_dense(buffer)
            module = self._model.get_submodule(key)
            with self._layers.resident(self._inside(key)):
                yield from self._of_group(module, block, buffer.calls, key)
                if amend_ is not None:
                    amend_(self._model.get_submodule(key), buffer.calls, [call.args[0] for call in buffer.dense])
            if self._layers.streams:
                release_free_memory()

    def _of_group(
        self, module: nn.Module, block: list[str], inputs: Sequence[Any], key: str | None
    ) -> Iterator[tuple[str, Moments]]:
        for names in [list(group) for group in groups({name: self._layers.layers[name] for name in block})]:
            group = {name: self._layers.layers[name] for name in names}
            if key is None:
                with self._layers.resident():
                    found = moments(module, group, inputs)
            else:
                found = moments(module, group, inputs)
            del group
            for name in names:
                if name in found:
                    yield name, found.pop(name)

    def _inside(self, key: str) -> list[str]:
        return [name for name in self._layers.layers if name == key or name.startswith(f"{key}.")]

    def _enter(self, parent: str) -> _Buffer:
        """Runs the model up to a chain's first block and keeps what it is called with."""
        buffer = _Buffer(parent, self.chains[parent])

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            buffer.calls.append(Call((args[0].detach().clone(), *args[1:]), kwargs))
            raise Enough

        handle = self._model.get_submodule(buffer.names[0]).register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with self._layers.resident(), evaluating(self._model):
                for batch in self._batches:
                    try:
                        run(self._model, batch)
                    except Enough:
                        continue
        finally:
            handle.remove()
        return buffer

    def _advance(self, buffer: _Buffer) -> None:
        """Replaces what enters the block at hand by what it returns."""
        self._move(buffer.names[buffer.position], buffer.calls)
        buffer.position += 1

    def _advance_dense(self, buffer: _Buffer) -> None:
        """Moves the dense path on until it has passed the block at hand, whose layers are dense as yet."""
        if not buffer.dense:
            buffer.dense = [Call((call.args[0].clone(), *call.args[1:]), call.kwargs) for call in buffer.calls]
            buffer.dense_position = buffer.position
        for name in buffer.names[buffer.dense_position : buffer.position + 1]:
            self._move(name, buffer.dense)
        buffer.dense_position = buffer.position + 1

    def _move(self, key: str, calls: Sequence[Call]) -> None:
        """Replaces what the calls of a block begin with by what the block returns, in place where that is possible."""
        block = self._model.get_submodule(key)
        with self._layers.resident(self._inside(key)), evaluating(block):
            for call in calls:
                before, output = call.args[0], block(*call.args, **call.kwargs)
                if output.shape == before.shape and output.dtype == before.dtype:
                    before.copy_(output)
                else:
                    call.args = (output, *call.args[1:])
