"""Softmax attention of all heads from packed rows q, k, v, without autograd.

The backward pass forms the scores anew and then needs four products; nothing but the packed rows goes in. The work is
cut where batched products can read it in place: into images with some of their heads each, or, where images are many
and short, into heads with some of the images each.

Legend: B images, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import ceil

import torch
from torch import Tensor

from thintune.ops.workspace import workspace

MOST_SCORES = 1 << 18
"""Scores that are worked on at once, unless one head of one image has more."""


def attention_into(out: Tensor, packed: Tensor, tokens: int, heads: int, scale: float) -> None:
    """Writes softmax(scale q k.T) v of every head.

    Args:
        out: (B N, D), overwritten; heads side by side.
        packed: (B N, 3 D): q of all heads, then k, then v.
        tokens: N.
        heads: that divide D.
        scale: factor on q k.T.
    """
    for rows, q, k, v in _pieces(packed, out, tokens, heads):
        rows.copy_(torch.bmm(_shares(q, k, scale), v, out=_like("values", q, v)))


def attention_gradients_(packed: Tensor, grad: Tensor, tokens: int, heads: int, scale: float) -> None:
    """Overwrites q, k, v by their gradients.

    Args:
        packed: (B N, 3 D) as `attention_into` got it.
        grad: (B N, D) gradient of its result.
        tokens: N.
        heads: that divide D.
        scale: factor on q k.T.
    """
    for g, q, k, v in _pieces(packed, grad, tokens, heads):
        shares = _shares(q, k, scale)
        inner = torch.bmm(g, v.transpose(1, 2), out=_like("score gradients", q, shares))
        v.copy_(torch.bmm(shares.transpose(1, 2), g, out=_like("values", v, v)))
        torch.ops.aten._softmax_backward_data.out(inner, shares, -1, shares.dtype, grad_input=inner)
        of_q = torch.bmm(inner, k, out=_like("values", q, k))
        k.copy_(torch.bmm(inner.transpose(1, 2), q, out=_like("keys", k, q)).mul_(scale))
        q.copy_(of_q.mul_(scale))


def _pieces(packed: Tensor, rows: Tensor, tokens: int, heads: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Views (P, N, D / heads) of the rows (B N, D) and of their q, k, v, together all heads of all images."""
    images = len(packed) // tokens
    size = max(1, MOST_SCORES // tokens**2)
    inputs, results = packed.view(images, tokens, 3, heads, -1), rows.view(images, tokens, heads, -1)
    if heads * ceil(images / size) < images * ceil(heads / size):
        for part, head in product(_parts(images, size), range(heads)):
            q, k, v = inputs[part, :, :, head].unbind(2)
            yield results[part, :, head], q, k, v
    else:
        for image, part in product(range(images), _parts(heads, size)):
            q, k, v = inputs[image, :, :, part].permute(1, 2, 0, 3).unbind(0)
            yield results[image, :, part].transpose(0, 1), q, k, v


def _parts(count: int, size: int) -> list[slice]:
    return [slice(at, at + size) for at in range(0, count, size)]


def _shares(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Softmax(scale q k.T) (P, N, N), valid until the next call."""
    scores = workspace.take("scores", (q.shape[0], q.shape[1], k.shape[1]), q)
    torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=scale, out=scores)
    return torch.softmax(scores, -1, out=scores)


def _like(name: str, rows: Tensor, columns: Tensor) -> Tensor:
    """(P, rows, columns), valid until the name is taken again."""
    return workspace.take(name, (rows.shape[0], rows.shape[1], columns.shape[2]), rows)
