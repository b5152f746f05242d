"""Tucker compression of one layer's input: warm-started, or anew each time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from thintune.linalg.tucker import compress_warm, hosvd


class TuckerCompressor(nn.Module):
    """Keeps the Tucker bases of a layer's input from step to step (ASI, arXiv 2505.05086).

    Calling it does not advance the warm start: every micro-batch and every recomputation of an optimizer step starts
    from the same bases, and `advance_` takes over the newest ones once a step. The batch mode always starts afresh,
    since two shuffled batches have no row in common.

    Args:
        shape: the input's shape at calibration, (n_1, ..., n_m, I).
        ranks: one per mode.
    """

    def __init__(self, shape: Sequence[int], ranks: Sequence[int]) -> None:
        super().__init__()
        self.shape, self.ranks = tuple(shape), tuple(ranks)
        self._names: list[str | None] = [None]
        self._pending: list[Tensor] = []
        for mode in range(1, len(shape)):
            name = f"factor{mode}"
            self.register_buffer(name, torch.zeros(shape[mode], min(self.ranks[mode], shape[mode])))
            self._names.append(name)

    def start_(self, factors: Sequence[Tensor]) -> None:
        """Sets the bases, one per mode; the batch mode's is ignored."""
        self._pending = list(factors)
        self.advance_()

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns core and factors of `x`, found by one subspace iteration from the kept bases."""
        warm = [None if name is None else self._warm(name) for name in self._names]
        core, factors = compress_warm(x, self.ranks, warm)
        self._pending = factors
        return core, factors

    def _warm(self, name: str) -> Tensor | None:
        factor = self.get_buffer(name)
        return factor if bool(factor.any()) else None

    @torch.no_grad()
    def advance_(self) -> None:
        """Takes over the bases of the newest call; once an optimizer step."""
        for name, factor in zip(self._names, self._pending, strict=False):
            if name is not None and factor.shape == self.get_buffer(name).shape:
                self.get_buffer(name).copy_(factor)
        self._pending = []


class HosvdCompressor(nn.Module):
    """The exact truncated HOSVD of a layer's input at every call, its ranks chosen anew (AMC, arXiv 2411.06346).

    Holds no state. Its price is an eigendecomposition of every mode's Gram matrix for every micro-batch, (n^3) each.

    Args:
        explained_variance: share of the variance that every mode must keep, in (0, 1].
    """

    ranks: tuple[int, ...] = ()
    """Empty: they differ from step to step."""

    def __init__(self, explained_variance: float) -> None:
        super().__init__()
        self.explained_variance = explained_variance

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns core and factors of `x`."""
        return hosvd(x, self.explained_variance)
