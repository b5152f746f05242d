"""The structure of a converted model as JSON, so that a run can be taken up without converting anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from thintune.convert.selection import freeze_as_, replace_, trains
from thintune.nn import (
    CompressedLinear,
    FactorLinear,
    HosvdCompressor,
    LeanBlock,
    PatchConv2d,
    SubspaceLinear,
    ThinLinear,
    TuckerCompressor,
    make_lean_,
    make_patches_product_,
)
from thintune.nn.adapter import AdaptedLinear

_LEAN = ("attention", "activation", "norm")


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Kind and sizes of every layer that trains in a thin way, and of every lean block or embedding, by name."""
    layers: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LeanBlock):
            layers[name] = {"kind": LeanBlock.__name__, **{n: getattr(module, f"lean_{n}") for n in _LEAN}}
        if isinstance(module, PatchConv2d):
            layers[name] = {"kind": PatchConv2d.__name__}
        if isinstance(module, SubspaceLinear | FactorLinear | CompressedLinear | AdaptedLinear):
            layers[name] = {
                "kind": type(module).__name__,
                "in_features": module.in_features,
                "out_features": module.out_features,
                "bias": module.bias is not None,
            }
        if isinstance(module, SubspaceLinear):
            layers[name] |= {"rank": module.rank, "activation_rank": module.basis.shape[1]}
            if module.left.dtype != module.update.dtype:
                layers[name]["factor_dtype"] = str(module.left.dtype).removeprefix("torch.")
        elif isinstance(module, FactorLinear):
            layers[name] |= {"rank": module.rank, "compressor": _describe(module.compressor)}
        elif isinstance(module, CompressedLinear):
            layers[name] |= {"compressor": _describe(module.compressor)}
        elif isinstance(module, AdaptedLinear):
            layers[name] |= {"rank": module.base.rank, "adapter_rank": module.rank, "alpha": module.alpha}
    return layers


def _describe(compressor: TuckerCompressor | HosvdCompressor | None) -> dict[str, Any] | None:
    if compressor is None:
        return None
    if isinstance(compressor, HosvdCompressor):
        return {"explained_variance": compressor.explained_variance}
    return {"shape": list(compressor.shape), "ranks": list(compressor.ranks)}


def rebuild_(model: nn.Module, layers: dict[str, dict[str, Any]]) -> None:
    """Puts empty layers (meta device) of the described kinds in place; `load_state_dict(assign=True)` fills them."""
    kinds = {kind.__name__: kind for kind in (SubspaceLinear, FactorLinear, CompressedLinear)}
    for name, spec in layers.items():
        arguments = dict(spec)
        if arguments["kind"] == LeanBlock.__name__:
            make_lean_(model.get_submodule(name), **{n: bool(arguments[n]) for n in _LEAN})
            continue
        if arguments["kind"] == PatchConv2d.__name__:
            make_patches_product_(model.get_submodule(name))
            continue
        if arguments.pop("kind") == AdaptedLinear.__name__:
            adapter = {"rank": arguments.pop("adapter_rank"), "alpha": arguments.pop("alpha")}
            base = ThinLinear(**arguments, device="meta")
            replace_(model, model.get_submodule(name), AdaptedLinear(base, **adapter))
            continue
        kind = kinds[spec["kind"]]
        described = arguments.pop("compressor", None)
        if described is not None:
            exact = "explained_variance" in described
            arguments["compressor"] = (HosvdCompressor if exact else TuckerCompressor)(**described)
        stored = arguments.pop("factor_dtype", None)
        old, new = model.get_submodule(name), kind(**arguments, device="meta")
        if stored is not None:
            assert isinstance(new, SubspaceLinear)
            new.store_(getattr(torch, stored))
        freeze_as_(new, *trains(old))
        replace_(model, old, new)
