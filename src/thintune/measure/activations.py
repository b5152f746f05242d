"""Bytes that autograd keeps alive between forward and backward."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_IN_PLACE = (
    "a tensor saved for the backward pass, of shape {shape}, has been modified by an inplace operation: it is at "
    "version {now}, expected version {saved}. Compute on a copy, or run the operation out of place."
)


class SavedActivations:
    """Counts the bytes that autograd saves inside the block, each distinct storage once.

    A saved view keeps its whole storage alive, so the whole storage counts. A storage counts from the first tensor
    saved in it until the graph lets go of the last one; `bytes` is the peak of that count. For one forward pass the
    peak is simply the sum; over a training loop it is the worst micro-batch, not a sum over steps.

    The count itself holds no tensor. Every saved tensor sits in a small holder that lives exactly as long as the graph
    wants it, so a storage in the count is alive, and its address cannot meanwhile belong to another one: an address
    that is freed and used again counts anew.

    What it does not see: tensors that a custom function keeps on `ctx` instead of giving them to `save_for_backward`;
    tensors taken by hooks that are entered inside the block (checkpointing and offloading do so: of a checkpointed
    block only the inputs count, which is what is kept); and storages shared with the parameters or buffers of
    `exclude`, which are there with or without a backward pass. A copy of a weight in another dtype does count.

    Saved tensors reach backward unchanged, and changing one in place is an error as without the hooks (autograd itself
    stops checking as soon as hooks are there). Only the identity of the Python object is lost.

    Args:
        exclude: module whose parameters and buffers are not counted; without it, saved weights count as activations.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> with SavedActivations(exclude=model) as saved:
        ...     loss = model(torch.ones(5, 4)).sum()
        >>> saved.bytes  # the float32 input, (5, 4)
        80
    """

    def __init__(self, exclude: nn.Module | None = None):
        self._ledger = _Ledger(exclude)
        self._stack = ExitStack()

    def __enter__(self) -> SavedActivations:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._ledger.pack, _unpack)
        self._stack.enter_context(hooks)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def bytes(self) -> int:
        """Peak of the bytes held at once."""
        return self._ledger.settled().peak_bytes

    @property
    def live_bytes(self) -> int:
        """Bytes held now: 0 once backward has run and the graph is gone."""
        return self._ledger.settled().live_bytes

    @property
    def by_shape(self) -> dict[tuple[int, ...], int]:
        """What made the peak: bytes by the shape of the first tensor saved in each storage, largest first."""
        sums: dict[tuple[int, ...], int] = {}
        for entry in self._ledger.settled().entries_at_peak():
            sums[entry.shape] = sums.get(entry.shape, 0) + entry.nbytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    @property
    def unmeasured(self) -> int:
        """How many saved tensors have no storage to measure (sparse or opaque layouts) and are missing in `bytes`."""
        return self._ledger.unmeasured


class _Entry(NamedTuple):
    """A storage in the count: its size, and the shape of the first tensor saved in it."""

    nbytes: int
    shape: tuple[int, ...]


class _Holder:
    """What the graph keeps in place of a saved tensor; reports to the ledger when the graph drops it."""

    __slots__ = ("keys", "released", "tensor", "version")

    def __init__(self, tensor: Tensor, keys: list[int], released: deque[list[int]]):
        # Detached: a result comes with its grad_fn, which owns this holder, and no collector sees through that cycle.
        self.tensor = tensor.detach()
        self.version = tensor._version
        self.keys = keys
        self.released = released

    def __del__(self) -> None:
        # Only an atomic append: the collector may run this at any moment, in the middle of the ledger's own work too.
        # It comes before the tensor is dropped, hence before the address can be used again.
        self.released.append(self.keys)


class _Ledger:
    """Which storages are held, by how many holders, and the peak of their bytes."""

    def __init__(self, exclude: nn.Module | None):
        self.live_bytes = 0
        self.peak_bytes = 0
        self.unmeasured = 0
        self._exclude = exclude
        self._excluded: dict[int, weakref.ref[Tensor]] = {}
        self._counts: dict[int, int] = {}
        self._entries: dict[int, _Entry] = {}
        self._at_peak: list[_Entry] | None = None  # None while the storages held now are those of the peak
        self._released: deque[list[int]] = deque()
        self._lock = threading.Lock()

    def pack(self, tensor: Tensor) -> _Holder:
        with self._lock:
            self._settle()
            if not self._counts:
                self._excluded = _owners(self._exclude)
            keys = self._retain(tensor)
        return _Holder(tensor, keys, self._released)

    def settled(self) -> _Ledger:
        with self._lock:
            self._settle()
        return self

    def entries_at_peak(self) -> list[_Entry]:
        return list(self._entries.values()) if self._at_peak is None else self._at_peak

    def _retain(self, tensor: Tensor) -> list[int]:
        """Adds the storages of `tensor` to the count; returns their keys, without those of the weights."""
        storages = _storages(tensor)
        self.unmeasured += not storages
        kept = [(key, nbytes) for key, nbytes in storages if not self._is_excluded(key)]
        for key, nbytes in kept:
            self._counts[key] = self._counts.get(key, 0) + 1
            if self._counts[key] == 1:
                self._entries[key] = _Entry(nbytes, tuple(tensor.shape))
                self.live_bytes += nbytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self._at_peak = None
        return [key for key, _ in kept]

    def _is_excluded(self, key: int) -> bool:
        """Whether `key` is still the storage of a weight, which may have got a new one since the table was made."""
        reference = self._excluded.get(key)
        owner = None if reference is None else reference()
        return owner is not None and any(key == current for current, _ in _storages(owner))

    def _settle(self) -> None:
        """Takes out what the graph has dropped since the last call."""
        if self._released and self._at_peak is None and self.live_bytes == self.peak_bytes:
            self._at_peak = list(self._entries.values())
        while self._released:
            for key in self._released.popleft():
                self._counts[key] -= 1
                if not self._counts[key]:
                    del self._counts[key]
                    self.live_bytes -= self._entries.pop(key).nbytes


def _unpack(holder: _Holder) -> Tensor:
    now = holder.tensor._version
    if now != holder.version:
        shape = tuple(holder.tensor.shape)
        raise RuntimeError(_IN_PLACE.format(shape=shape, now=now, saved=holder.version))
    return holder.tensor


def _owners(module: nn.Module | None) -> dict[int, weakref.ref[Tensor]]:
    """Storage identity -> the parameter or buffer it belongs to."""
    if module is None:
        return {}
    weights = [*module.parameters(), *module.buffers()]
    return {key: weakref.ref(weight) for weight in weights for key, _ in _storages(weight)}


def _storages(tensor: Tensor) -> list[tuple[int, int]]:
    """(identity, bytes) of each storage below `tensor`; several for a subclass that wraps others, none if unmeasurable.

    The identity is the address of the storage object, not of its data, so tensors on the meta device work too.
    """
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [storage for name in names for storage in _storages(getattr(tensor, name))]
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse and opaque layouts
        return []
    return [(storage._cdata, storage.nbytes())]
