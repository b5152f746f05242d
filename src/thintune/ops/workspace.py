"""Memory for what lives no longer than one chunk of work.

A fresh allocation of a few megabytes costs the kernel a page fault every 4 KB, and holes in the heap when it is freed
among tensors that stay. Buffers that are taken again and again cost neither.
"""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor


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
