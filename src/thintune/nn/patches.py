"""Patch embeddings that need no more than one matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchConv2d(nn.Conv2d):
    """A convolution whose patches do not overlap, as one product of their pixels while it trains.

    Equal to `nn.Conv2d` up to rounding. The gradient of a convolution's weight takes several copies of that weight and
    of the patches on a CPU; that of a product takes itself.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, O, H // k, W // k)."""
        if not torch.is_grad_enabled() or input.dim() != 4:
            return super().forward(input)
        (high, wide), batch = self.stride, input.shape[0]
        down, across = input.shape[2] // high, input.shape[3] // wide
        whole = input[:, :, : down * high, : across * wide]
        patches = whole.reshape(batch, -1, down, high, across, wide).permute(0, 2, 4, 1, 3, 5)
        rows = patches.reshape(batch * down * across, -1)
        output = F.linear(rows, self.weight.view(self.out_channels, -1), self.bias)
        return output.view(batch, down, across, -1).permute(0, 3, 1, 2)


def make_patches_product_(model: nn.Module) -> list[str]:
    """Gives every convolution of patches that do not overlap the class above, in place; returns their names."""
    found = []
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d and _is_product(module):
            module.__class__ = PatchConv2d
            found.append(name)
    return found


def _is_product(conv: nn.Conv2d) -> bool:
    plain = conv.dilation == (1, 1) and conv.groups == 1 and conv.padding in ((0, 0), "valid")
    return plain and conv.kernel_size == conv.stride and max(conv.kernel_size) > 1
