"""Softmax attention of all heads from packed rows q, k, v, image by image, without autograd.

The backward pass forms the scores anew and then needs four products; nothing but the packed rows goes in. Where the
scores of all heads would be large, a few heads go at a time.

Legend: N tokens, D width, one image at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from thintune.ops.workspace import workspace

MOST_SCORES = 1 << 18
"""Scores of an image that are worked on at once, if it has more than one head."""


def attention_into(out: Tensor, packed: Tensor, tokens: int, heads: int, scale: float) -> None:
    """Writes softmax(scale q k.T) v of every head.

    Args:
        out: (B N, D), overwritten; heads side by side.
        packed: (B N, 3 D): q of all heads, then k, then v.
        tokens: N.
        heads: that divide D.
        scale: factor on q k.T.
    """
    for image, rows in zip(packed.split(tokens), out.split(tokens), strict=True):
        whole = rows.view(tokens, heads, -1)
        for part, q, k, v in _heads(image, heads):
            mixed = torch.bmm(_shares(q, k, scale), v, out=_like("values", q, v))
            whole[:, part].copy_(mixed.transpose(0, 1))


def attention_gradients_(packed: Tensor, grad: Tensor, tokens: int, heads: int, scale: float) -> None:
    """Overwrites q, k, v by their gradients.

    Args:
        packed: (B N, 3 D) as `attention_into` got it.
        grad: (B N, D) gradient of its result.
        tokens: N.
        heads: that divide D.
        scale: factor on q k.T.
    """
    for image, above in zip(packed.split(tokens), grad.split(tokens), strict=True):
        whole = above.view(tokens, heads, -1)
        for part, q, k, v in _heads(image, heads):
            g = whole[:, part].transpose(0, 1)
            shares = _shares(q, k, scale)
            inner = torch.bmm(g, v.transpose(1, 2), out=_like("score gradients", q, shares))
            v.copy_(torch.bmm(shares.transpose(1, 2), g, out=_like("values", v, v)))
            torch.ops.aten._softmax_backward_data.out(inner, shares, -1, shares.dtype, grad_input=inner)
            of_q = torch.bmm(inner, k, out=_like("values", q, k))
            k.copy_(torch.bmm(inner.transpose(1, 2), q, out=_like("keys", k, q)).mul_(scale))
            q.copy_(of_q.mul_(scale))


def _heads(image: Tensor, heads: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Some heads of (N, 3 D) at a time: which, and views q, k, v (heads, N, D / heads)."""
    packed = image.view(len(image), 3, heads, -1).permute(1, 2, 0, 3)
    size = max(1, MOST_SCORES // len(image) ** 2)
    for at in range(0, heads, size):
        part = slice(at, at + size)
        q, k, v = packed[:, part].unbind(0)
        yield part, q, k, v


def _shares(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Softmax(scale q k.T) (heads, N, N), valid until the next call."""
    scores = workspace.take("scores", (q.shape[0], q.shape[1], k.shape[1]), q)
    torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=scale, out=scores)
    return torch.softmax(scores, -1, out=scores)


def _like(name: str, rows: Tensor, columns: Tensor) -> Tensor:
    """(heads, rows, columns), valid until the name is taken again."""
    return workspace.take(name, (rows.shape[0], rows.shape[1], columns.shape[2]), rows)
