"""Transformer blocks that keep little for the backward pass.

`make_lean_` gives a pre-norm block a subclass of its own class: children, names and state stay as they are,
`isinstance` goes on to hold, and outside training the block runs its own forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from thintune import ops
from thintune.nn.linear import SubspaceLinear

_KNOWN = ("timm.models.vision_transformer.Block",)
"""Block classes whose forward pass is x + s1 attn(norm1(x)), then x + s2 mlp(norm2(x))."""


class LeanBlock:
    """Mixed into a block's class: its two residual branches run as `thintune.ops` functions while it trains.

    A branch is taken over where its operation is asked for; the other runs the block's own modules.
    """

    lean_attention: bool
    lean_activation: bool
    lean_norm: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Maps (B, N, D) to (B, N, D)."""
        block: Any = self
        plain = not args and all(value is None or value is False for value in kwargs.values())
        if not (torch.is_grad_enabled() and plain):
            return super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if self.lean_attention:
            x = ops.attention_branch(
                x,
                *_norm(block.norm1),
                _scale(block.ls1),
                *_layers(block.attn.qkv, block.attn.proj),
                self._options(block.norm1, block.attn.qkv, block.attn.proj),
            )
        else:
            x = x + block.ls1(block.attn(block.norm1(x)))
        if self.lean_activation:
            return ops.mlp_branch(
                x,
                *_norm(block.norm2),
                _scale(block.ls2),
                *_layers(block.mlp.fc1, block.mlp.fc2),
                self._options(block.norm2, block.mlp.fc1, block.mlp.fc2),
            )
        return x + block.ls2(block.mlp(block.norm2(x)))

    def _options(self, norm: nn.LayerNorm, first: SubspaceLinear, second: SubspaceLinear) -> ops.BranchOptions:
        attention: Any = getattr(self, "attn")  # noqa: B009 - of the class this one is mixed into
        return ops.BranchOptions(
            eps=norm.eps,
            exact_norm=not self.lean_norm,
            heads=attention.num_heads,
            scale=attention.scale,
            observe_first=first.capture if first.capturing else None,
            observe_second=second.capture if second.capturing else None,
        )


def make_lean_(block: nn.Module, *, attention: bool = True, activation: bool = True, norm: bool = True) -> None:
    """Makes a block lean in place, or changes what of it is.

    Args:
        block: one of which `why_not_lean` says nothing.
        attention: take over the attention branch.
        activation: take over the MLP branch.
        norm: keep the normalised inputs of those branches in 8 bits instead of whole.
    """
    if not isinstance(block, LeanBlock):
        block.__class__ = _lean_class(type(block))
    block.lean_attention, block.lean_activation, block.lean_norm = attention, activation, norm  # pyright: ignore


def make_plain_(block: nn.Module) -> None:
    """Gives a lean block its own class back."""
    if isinstance(block, LeanBlock):
        block.__class__ = type(block).__mro__[2]
        for name in ("lean_attention", "lean_activation", "lean_norm"):
            delattr(block, name)


_CLASSES: dict[type, type] = {}


def _lean_class(kind: type) -> type:
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Lean{kind.__name__}", (LeanBlock, kind), {"__doc__": kind.__doc__})
    return _CLASSES[kind]


def is_block(module: nn.Module) -> bool:
    """Whether the module is a block of a kind that can be lean."""
    return isinstance(module, LeanBlock) or f"{type(module).__module__}.{type(module).__qualname__}" in _KNOWN


def why_not_lean(block: nn.Module) -> str | None:
    """What keeps a block from being lean, or None."""
    b: Any = block
    linears = {"attn.qkv": b.attn.qkv, "attn.proj": b.attn.proj, "mlp.fc1": b.mlp.fc1, "mlp.fc2": b.mlp.fc2}
    for name, layer in linears.items():
        if not isinstance(layer, SubspaceLinear) or layer.bias is None:
            return f"{name} is no thin layer with a bias"
    for name in ("norm1", "norm2"):
        norm = getattr(b, name)
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
            return f"{name} is no layer norm with weight and bias"
    if not isinstance(b.mlp.act, nn.GELU) or b.mlp.act.approximate != "none":
        return "mlp.act is no exact GELU"
    for name in ("attn.q_norm", "attn.k_norm", "attn.norm", "mlp.norm", "drop_path1", "drop_path2"):
        if not isinstance(block.get_submodule(name), nn.Identity):
            return f"{name} is in use"
    if getattr(b.attn, "gate", None) is not None:
        return "attn.gate is in use"
    for name in ("attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2"):
        if getattr(block.get_submodule(name), "p", 0.0):
            return f"{name} is in use"
    return None


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return norm.weight, norm.bias


def _scale(scale: nn.Module) -> Tensor | None:
    return getattr(scale, "gamma", None)


def _layers(first: SubspaceLinear, second: SubspaceLinear) -> tuple[ops.ThinWeights, ops.ThinWeights]:
    return _weights(first), _weights(second)


def _weights(layer: SubspaceLinear) -> ops.ThinWeights:
    assert layer.bias is not None
    return ops.ThinWeights(layer.left, layer.right, layer.bias, layer.update, layer.basis)
