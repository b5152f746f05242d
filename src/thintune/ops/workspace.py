"""Memory that is taken again and again: for one chunk of work, or from a forward pass to its backward pass.

A fresh allocation of a few megabytes costs the kernel a page fault every 4 KB, and holes in the heap when it is freed
among tensors that stay. Buffers that are taken again and again cost neither.
"""

from __future__ import annotations

import mmap
import threading
from math import prod

import torch
from torch import Tensor

_SMALLEST_MAPPING = 64 << 10
"""Bytes from which a buffer of a pool gets pages of its own."""


class Workspace(threading.local):
    """Named buffers of this thread, which grow as needed and stay until `clear`.

    Whoever takes a buffer owns it until the name is taken again; nothing that outlives its chunk may be put in one.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of that shape, with the type and the device of `like`."""
        key, size = (name, like.dtype, like.device), prod(shape)
        found = self._buffers.get(key)
        if found is None or found.numel() < size:
            self._buffers[key] = found = torch.empty(size, dtype=like.dtype, device=like.device)
        return found[:size].view(shape)

    @property
    def bytes(self) -> int:
        """Bytes of this thread's buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

    def clear(self) -> None:
        """Lets go of this thread's buffers."""
        self._buffers.clear()


workspace = Workspace()
"""The buffers of `thintune.ops`."""


class Pool:
    """Buffers that are lent out for longer and come back: what forward passes keep for their backward passes.

    On a CPU each is mapped by itself, so that the heap holds only what is short-lived and finds its holes filled again.
    A tensor that is never given back belongs to whoever holds it.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[object, ...], list[Tensor]] = {}

    def take(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor (rows, columns): the smallest free one of that width with room for it, or a new one.

        Where all free ones are too small, one of them makes room for the new one.
        """
        if device.type != "cpu":
            return torch.empty(rows, columns, dtype=dtype, device=device)  # its allocator does all this
        free, size = self._free.setdefault((columns, dtype), []), rows * columns
        fitting = [number for number, buffer in enumerate(free) if len(buffer) >= size]
        if fitting:
            found = free.pop(min(fitting, key=lambda number: len(free[number])))
        else:
            del free[:1]
            found = _mapped(size, dtype)
        return found[:size].view(rows, columns)

    def give_back(self, *tensors: Tensor) -> None:
        """Takes back what `take` gave; its values are lost with the next taking."""
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor._base is not None:
                self._free.setdefault((tensor.shape[1], tensor.dtype), []).append(tensor._base)

    @property
    def bytes(self) -> int:
        """Bytes of the free buffers."""
        return sum(buffer.nbytes for free in self._free.values() for buffer in free)

    def clear(self) -> None:
        """Lets go of the free buffers."""
        self._free.clear()


def _mapped(size: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised flat memory, outside the heap where it is large."""
    if size * dtype.itemsize < _SMALLEST_MAPPING:
        return torch.empty(size, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype)


class _Pools(threading.local):
    def __init__(self) -> None:
        self.mine = Pool()


_pools = _Pools()


def pool() -> Pool:
    """This thread's pool of what `thintune.ops` keeps. A backward pass in another thread gives back to the same."""
    return _pools.mine


def release_buffers() -> None:
    """Lets go of all that this thread's `workspace` and `pool` hold, as before another kind of work."""
    workspace.clear()
    _pools.mine.clear()
