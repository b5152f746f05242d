"""A frozen thin layer with a low-rank adapter beside it (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thintune.nn.linear import ThinLinear


class AdaptedLinear(nn.Module):
    """y = base(x) + (alpha / r) (x A.T) B.T: the base is frozen, A starts random and B at zero.

    Autograd keeps what LoRA keeps on a dense layer: x (..., I) for the gradient of A, and x A.T (..., r) for that of
    B. The frozen factors keep nothing.

    Args:
        base: thin layer, frozen from here on.
        rank: r of the adapter.
        alpha: scale of the adapter, divided by its rank.
    """

    def __init__(self, base: ThinLinear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha = rank, alpha
        like = {"device": base.left.device, "dtype": base.left.dtype}
        self.down = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as peft starts LoRA

    def forward(self, input: Tensor) -> Tensor:
        """Maps (..., I) to (..., O)."""
        return self.base(input) + F.linear(F.linear(input, self.down) * (self.alpha / self.rank), self.up)

    @property
    def bias(self) -> nn.Parameter | None:
        """(O,) of the base, frozen with it."""
        return self.base.bias

    @property
    def kept_elements(self) -> int:
        """Elements of the merged layer's weight, dense or thin."""
        thin = (self.base.rank + self.rank) * (self.in_features + self.out_features)
        return min(thin, self.in_features * self.out_features)

    @torch.no_grad()
    def merged(self) -> ThinLinear | nn.Linear:
        """The layer that is shipped: thin, of rank K + r, or dense where that is no larger."""
        left, right = self.base.left.detach(), self.base.right.detach()
        sizes, has_bias = (self.in_features, self.out_features), self.bias is not None
        up, kind = self.up * (self.alpha / self.rank), {"device": "meta", "dtype": left.dtype}
        value = None if self.bias is None else self.bias.detach()
        rank = self.base.rank + self.rank
        if rank * sum(sizes) < sizes[0] * sizes[1]:
            thin = ThinLinear(*sizes, rank, has_bias, **kind)
            thin.set_(torch.cat([left, up], 1), torch.cat([right, self.down]), value)
            return thin.train(self.training)
        dense = nn.Linear(*sizes, has_bias, **kind)
        dense.weight = nn.Parameter(torch.addmm(up @ self.down, left, right))
        if value is not None:
            dense.bias = nn.Parameter(value)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Sizes of the adapter, for printing."""
        return f"rank={self.rank}, alpha={self.alpha}"
