"""The two residual branches of a pre-norm transformer block as one autograd function each.

attention:  out = x + s * proj(attention(qkv(norm(x))))
mlp:        out = x + s * fc2(gelu(fc1(norm(x))))

with thin linear layers (see `thintune.ops.subspace`) and an optional layer scale s. Autograd would keep about 17 D
values a token of such a block. Here a branch keeps the normalised input in 8 bits, the thin product z = y R.T of its
first layer (K values), from which the backward pass recomputes q, k, v or the input of the GELU by the second thin
product, and the projections y U (r values) that the update gradients need. Nothing is approximated but the 8-bit
copy, and that is kept whole on request.

Both passes go through the rows in chunks, so that what is D, 3 D or 4 D wide never exists for all rows at once.

Legend: B images, N tokens, M = B N rows, D width, K and r ranks of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thintune.ops.attention import attention_gradients_, attention_into
from thintune.ops.normalize import dequantize_rows, normalization_gradients, normalize_rows, quantize_rows_into
from thintune.ops.products import linear, linear_into
from thintune.ops.workspace import Pool, pool, workspace

CHUNK_ROWS = 2048
"""Most rows that are worked on at once."""


class ThinWeights(NamedTuple):
    """Tensors of one thin layer that trains through its update."""

    left: Tensor
    """(O, K)."""
    right: Tensor
    """(K, I)."""
    bias: Tensor
    """(O,)."""
    update: Tensor
    """(O, r), all zeros; its gradient is what is wanted."""
    basis: Tensor
    """(I, r)."""


@dataclass(frozen=True)
class BranchOptions:
    """What is no tensor."""

    eps: float
    """Of the normalisation."""
    exact_norm: bool = False
    """Keep the normalised input whole."""
    heads: int = 1
    """`attention_branch`: heads."""
    scale: float = 1.0
    """`attention_branch`: factor on q k.T."""
    observe_first: Callable[[Tensor], None] | None = None
    """Told the input rows of the branch's first layer."""
    observe_second: Callable[[Tensor], None] | None = None
    """Told the input rows of the branch's second layer."""


class _Branch:
    """The tensors of one branch, by name."""

    def __init__(self, tensors: tuple[Any, ...]) -> None:
        self.tensors = tensors
        self.gamma, self.beta, self.scale = tensors[:3]
        self.first = _widened("first", ThinWeights(*tensors[3:8]))
        self.second = _widened("second", ThinWeights(*tensors[8:13]))


def _widened(name: str, layer: ThinWeights) -> ThinWeights:
    """The layer with factors in the type it computes in, valid until the next call under that name."""
    if layer.left.dtype == layer.bias.dtype:
        return layer
    left, right = (
        workspace.take(f"{name} {part}", tuple(tensor.shape), layer.bias).copy_(tensor)
        for part, tensor in (("left", layer.left), ("right", layer.right))
    )
    return layer._replace(left=left, right=right)


def _chunks(rows: int, tokens: int) -> Iterator[slice]:
    """Whole images: half of them, since scratch memory is then small beside what is kept, but no more than is fast."""
    size = tokens * max(1, min(rows // 2, CHUNK_ROWS) // tokens)
    return (slice(at, min(at + size, rows)) for at in range(0, rows, size))


class _Forward:
    """What the forward pass of a branch keeps, filled chunk by chunk."""

    def __init__(self, branch: _Branch, rows: Tensor, options: BranchOptions) -> None:
        self.branch, self.options, self.pool = branch, options, pool()
        first, second = branch.first, branch.second
        self.values = self._room(rows, rows.shape[1], rows.dtype if options.exact_norm else torch.int8)
        self.step, self.rstd = self._room(rows, 1).fill_(1), self._room(rows, 1)
        self.reduced = self._room(rows, first.right.shape[0])
        self.seen = self._room(rows, first.basis.shape[1])
        self.seen_second = self._room(rows, second.basis.shape[1])
        self.reduced_second = self._room(rows if branch.scale is not None else rows[:0], second.right.shape[0])

    def _room(self, rows: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.pool.take(len(rows), width, dtype or rows.dtype, rows.device)

    def first_layer(self, rows: Tensor, chunk: slice) -> Tensor:
        """Normalises, keeps, and gives the first layer's thin product (m, K)."""
        branch, options = self.branch, self.options
        normal, self.rstd[chunk] = normalize_rows(rows, options.eps)
        if options.exact_norm:
            self.values[chunk] = normal
        else:
            quantize_rows_into(normal, self.values[chunk], self.step[chunk])
        torch.addcmul(branch.beta, normal, branch.gamma, out=normal)
        if options.observe_first is not None:
            options.observe_first(normal)
        torch.mm(normal, branch.first.basis, out=self.seen[chunk])
        return self.reduced[chunk].copy_(linear(normal, branch.first.right, scratch="reduced"))

    def second_layer(self, inner: Tensor, rows: Tensor, out: Tensor, chunk: slice) -> None:
        """Writes rows + s * second(inner) to out."""
        second, scale = self.branch.second, self.branch.scale
        if self.options.observe_second is not None:
            self.options.observe_second(inner)
        torch.mm(inner, second.basis, out=self.seen_second[chunk])
        reduced = linear(inner, second.right, scratch="reduced")
        if scale is None:
            torch.add(rows, _expand(second, reduced), out=out)
        else:
            self.reduced_second[chunk] = reduced
            torch.addcmul(rows, _expand(second, reduced), scale, out=out)

    def keep(self, ctx: Any) -> None:
        """Hands everything to autograd."""
        b = self.branch
        ctx.options, ctx.pool = self.options, self.pool
        ctx.save_for_backward(
            self.values,
            self.step,
            self.rstd,
            self.reduced,
            self.seen,
            self.seen_second,
            self.reduced_second,
            *b.tensors,
        )


class _Backward:
    """Gradients of a branch, added up chunk by chunk."""

    def __init__(self, ctx: Any, grad: Tensor) -> None:
        tensors = ctx.saved_tensors
        self.kept: tuple[Tensor, ...] = tensors[:7]
        self.pool: Pool = ctx.pool
        self.values, self.step, self.rstd, self.reduced, self.seen, self.seen_second, self.reduced_second = self.kept
        self.branch = b = _Branch(tuple(tensors[7:]))
        self.rows = grad.reshape(-1, grad.shape[-1])
        self.grad_x = torch.empty_like(self.rows)
        self.gamma, self.beta = torch.zeros_like(b.gamma), torch.zeros_like(b.beta)
        self.scale = None if b.scale is None else torch.zeros_like(b.scale)
        self.biases = torch.zeros_like(b.first.bias), torch.zeros_like(b.second.bias)
        self.updates: list[Tensor | None] = [None, None]

    def second_layer(self, chunk: slice) -> Tensor:
        """Gradient (m, I) of the second layer's input."""
        second, scale = self.branch.second, self.branch.scale
        grad = self.rows[chunk]
        if scale is not None and self.scale is not None:
            output = _expand(second, self.reduced_second[chunk])
            self.scale += output.mul_(grad).sum(0)
            grad = torch.mul(grad, scale, out=output)
        self.biases[1].add_(grad.sum(0))
        self._update(1, self.seen_second[chunk], grad)
        reduced = linear(grad, second.left.T, scratch="reduced")
        out = workspace.take("wide gradient", (len(reduced), second.right.shape[1]), reduced)
        return torch.mm(reduced, second.right, out=out)

    def first_output(self, chunk: slice) -> Tensor:
        """The first layer's output (m, O), from the thin product that was kept."""
        return _expand(self.branch.first, self.reduced[chunk])

    def first_layer(self, grad: Tensor, chunk: slice) -> None:
        """Takes the gradient (m, O) of the first layer's output down to the branch's input."""
        first = self.branch.first
        self.biases[0].add_(grad.sum(0))
        self._update(0, self.seen[chunk], grad)
        reduced = linear(grad, first.left.T, scratch="reduced")
        grad_normal = linear(reduced, first.right.T, scratch="narrow gradient")
        normal = dequantize_rows(self.values[chunk], self.step[chunk])
        inner, gamma, beta = normalization_gradients(grad_normal, normal, self.branch.gamma)
        torch.addcmul(self.rows[chunk], inner, self.rstd[chunk], out=self.grad_x[chunk])
        assert gamma is not None and beta is not None
        self.gamma += gamma
        self.beta += beta

    def _update(self, layer: int, seen: Tensor, grad: Tensor) -> None:
        """Adds G.T (X U) (O, r)."""
        found, before = linear(seen.T, grad.T, scratch="update"), self.updates[layer]
        self.updates[layer] = found.T.contiguous() if before is None else before.add_(found.T)

    def gradients(self, shape: torch.Size) -> tuple[Tensor | None, ...]:
        """In the order of the function's arguments; what was kept is given back, unless the graph is used again."""
        if not _keeps_graph():
            self.pool.give_back(*self.kept)
        layers = [(None, None, bias, update, None) for bias, update in zip(self.biases, self.updates, strict=True)]
        return self.grad_x.reshape(shape), self.gamma, self.beta, self.scale, *layers[0], *layers[1], None


def _keeps_graph() -> bool:
    """Whether this backward pass leaves its graph for another one; yes where torch does not tell."""
    autograd: Any = getattr(torch._C, "_autograd", None)
    tells = getattr(autograd, "_get_current_graph_task_keep_graph", None)
    return True if tells is None else bool(tells())


def _expand(layer: ThinWeights, reduced: Tensor) -> Tensor:
    """Z L.T + b (m, O), valid until the next call."""
    out = workspace.take("wide", (len(reduced), len(layer.left)), reduced)
    return linear_into(out, reduced, layer.left, layer.bias)


class _MlpBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        *tensors, options = arguments
        rows = x.reshape(-1, x.shape[-1])
        kept = _Forward(_Branch(tuple(tensors)), rows, options)
        out = torch.empty_like(rows)
        for chunk in _chunks(len(rows), x.shape[-2]):
            reduced = kept.first_layer(rows[chunk], chunk)
            inner = torch.ops.aten.gelu_(_expand(kept.branch.first, reduced))
            kept.second_layer(inner, rows[chunk], out[chunk], chunk)
        kept.keep(ctx)
        return out.reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        work = _Backward(ctx, grads[0])
        for chunk in _chunks(len(work.rows), grads[0].shape[-2]):
            grad = work.second_layer(chunk)
            torch.ops.aten.gelu_backward.grad_input(grad, work.first_output(chunk), grad_input=grad)
            work.first_layer(grad, chunk)
        return work.gradients(grads[0].shape)


class _AttentionBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        *tensors, options = arguments
        rows = x.reshape(-1, x.shape[-1])
        kept = _Forward(_Branch(tuple(tensors)), rows, options)
        out = torch.empty_like(rows)
        tokens = x.shape[-2]
        for chunk in _chunks(len(rows), tokens):
            packed = _expand(kept.branch.first, kept.first_layer(rows[chunk], chunk))
            mixed = workspace.take("mixed", (len(packed), x.shape[-1]), packed)
            attention_into(mixed, packed, tokens, options.heads, options.scale)
            kept.second_layer(mixed, rows[chunk], out[chunk], chunk)
        kept.keep(ctx)
        ctx.tokens = tokens
        return out.reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        work = _Backward(ctx, grads[0])
        heads, scale = ctx.options.heads, ctx.options.scale
        for chunk in _chunks(len(work.rows), ctx.tokens):
            grad = work.second_layer(chunk)
            packed = work.first_output(chunk)
            attention_gradients_(packed, grad, ctx.tokens, heads, scale)
            work.first_layer(packed, chunk)
        return work.gradients(grads[0].shape)


def mlp_branch(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    layer_scale: Tensor | None,
    first: ThinWeights,
    second: ThinWeights,
    options: BranchOptions,
) -> Tensor:
    """X + s * fc2(gelu(fc1(norm(x)))).

    Args:
        x: (..., D).
        gamma: (D,) weight of the normalisation.
        beta: (D,) bias of the normalisation.
        layer_scale: s (D,) or None for 1.
        first: fc1, D to H.
        second: fc2, H to D.
        options: eps and what to keep.

    Returns:
        (..., D). Saves for backward M (D + 4 (2 + K_1 + r_1 + r_2)) bytes in float32, 4 K_2 M more with a layer
        scale, and 3 D M more with an exact normalisation.
    """
    result = _MlpBranch.apply(x, gamma, beta, layer_scale, *first, *second, options)
    assert isinstance(result, Tensor)
    return result


def attention_branch(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    layer_scale: Tensor | None,
    first: ThinWeights,
    second: ThinWeights,
    options: BranchOptions,
) -> Tensor:
    """X + s * proj(attention(qkv(norm(x)))), the attention of every head softmax(scale q k.T) v.

    Args:
        x: (B, N, D).
        gamma: (D,) weight of the normalisation.
        beta: (D,) bias of the normalisation.
        layer_scale: s (D,) or None for 1.
        first: qkv, D to 3 D: q of all heads, then k, then v.
        second: proj, D to D.
        options: eps, heads, scale, and what to keep.

    Returns:
        (B, N, D). Saves for backward as many bytes as `mlp_branch`.
    """
    result = _AttentionBranch.apply(x, gamma, beta, layer_scale, *first, *second, options)
    assert isinstance(result, Tensor)
    return result
