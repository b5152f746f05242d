"""Dense layers to thin ones, in place, one block at a time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from thintune.config import METHODS, Method, ThinConfig
from thintune.convert.activations import tucker_compressors
from thintune.convert.calibration import checked_batches
from thintune.convert.data_aware import Converted, convert_data_aware
from thintune.convert.lean import make_blocks_lean_
from thintune.convert.ranks import choose_ranks
from thintune.convert.report import ConversionReport, LayerReport
from thintune.convert.selection import put_, select
from thintune.convert.weights import DenseLayers, WeightSource
from thintune.convert.whitened import convert_whitened
from thintune.errors import ConfigError, ConversionError, nearest
from thintune.linalg import truncated_svd
from thintune.measure import returning_large_blocks
from thintune.nn import CompressedLinear, FactorLinear, HosvdCompressor, ThinLinear, TuckerCompressor

CONVERTIBLE: tuple[Method, ...] = ("thin", "wasi", "wsi", "asi", "amc", "svd_lora")
"""Methods that replace layers."""


@torch.no_grad()
def convert_(
    model: nn.Module,
    config: ThinConfig | None = None,
    *,
    method: Method = "thin",
    calibration: Iterable[Any] | None = None,
    activation_ranks: Mapping[str, tuple[int, ...]] | None = None,
    source: WeightSource | None = None,
) -> ConversionReport:
    """Makes the linear layers of a model thin, in place.

    - `thin`: data-aware factors, found block by block on the already converted path; gradients in a subspace of each
      layer's input. By `config` also ranks and factors by what the model's features lose, and reconstruction of blocks.
    - `wsi`, `wasi`: truncated SVD of each weight (arXiv 2510.09160), the input kept whole or as a Tucker form.
    - `svd_lora`: truncated SVD of each weight in the norm of its inputs (SVD-LLM, arXiv 2403.07378), frozen.
    - `asi`: the weight stays dense, the input is kept as a Tucker form (arXiv 2505.05086).
    - `amc`: the same with the exact HOSVD of every input, its ranks chosen anew each time (arXiv 2411.06346).

    Nothing is changed before every check has passed.

    Args:
        model: any module whose linear layers are called (not read) in its forward pass.
        config: ranks and patterns; `ThinConfig()` by default.
        method: `thin`, `wasi`, `wsi`, `asi`, `amc` or `svd_lora`.
        calibration: batches of inputs, unlabelled: a tensor each, or a tuple or dict of arguments. Not needed by
            `wsi` and `amc`.
        activation_ranks: `asi` and `wasi`: Tucker ranks by layer, as a plan gives them, instead of those of
            `config.activation_explained_variance`.
        source: `thin`: of the tensors of a model on the meta device. Dense weights are read block by block and dropped
            again: the peak is that of the thin model, one layer's decomposition and the calibration inputs of a block.

    Returns:
        What was replaced, what was skipped and why, bytes before and after.

    Raises:
        ConfigError: an unknown method.
        ConversionError: no layer matched or was called, a rank above a layer's limit, or no calibration where it is
            needed.

    Example:
        >>> import torch, thintune as tt
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
        >>> report = tt.convert_(model, tt.ThinConfig(kept=0.5), calibration=[torch.randn(64, 8)])
        >>> report.kept_weight_fraction <= 0.5
        True
    """
    config = with_defaults(config or ThinConfig(), method)
    if source is not None and method != "thin":
        raise ConversionError(f"source: only method thin reads weights one at a time, got {method!r}; load the model.")
    layers, skipped = select(model, config)
    if config.rank is not None and method not in ("asi", "amc"):
        choose_ranks(layers, dict, config, cap=False)  # raises before anything is changed
    linears = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)}
    before = {
        n: (m.out_features, m.in_features, m.weight.numel() * m.weight.element_size()) for n, m in linears.items()
    }
    del linears  # from here on only `layers` and the model hold dense layers, and both let go of them one by one
    if method == "thin":
        batches = checked_batches(calibration)
        convert = convert_data_aware(model, DenseLayers(model, layers, source), config, batches)
    elif method == "svd_lora":
        convert = convert_whitened(model, layers, config, checked_batches(calibration))
    else:
        compressors: Mapping[str, TuckerCompressor | HosvdCompressor] | None = None
        if method == "amc":
            compressors = {name: HosvdCompressor(config.activation_explained_variance) for name in layers}
        elif method != "wsi":
            batches = checked_batches(calibration)
            compressors = tucker_compressors(model, layers, batches[0], config, activation_ranks)
        convert = _convert_published(model, layers, config, method, compressors)
    with contextlib.nullcontext() if source is None else returning_large_blocks(1 << 18):
        converted = {
            name: LayerReport(name, *before[name][:2], rank, ranks, before[name][2], _weight_bytes(new))
            for name, new, rank, ranks in convert
        }
    if not converted:
        raise ConversionError(f"none of {', '.join(layers)} is called on the calibration inputs.")
    lean = make_blocks_lean_(model, config) if method == "thin" else {}
    return _report(method, before, converted, skipped, lean)


def _report(
    method: str,
    before: Mapping[str, tuple[int, int, int]],
    converted: Mapping[str, LayerReport],
    skipped: Mapping[str, str],
    lean: dict[str, str | None],
) -> ConversionReport:
    layers = []
    for name, (out_features, in_features, size) in before.items():
        if name in converted:
            layers.append(converted[name])
            continue
        reason = skipped.get(name, "never called on the calibration inputs")
        layers.append(LayerReport(name, out_features, in_features, None, None, size, size, reason))
    return ConversionReport(method, layers, lean)


def with_defaults(config: ThinConfig, method: Method) -> ThinConfig:
    """Fills in what the method takes when no rank is asked for.

    Raises:
        ConfigError: a method that converts nothing.
    """
    if method not in CONVERTIBLE:
        raise ConfigError(
            f"method: expected one of {', '.join(CONVERTIBLE)}, got {method!r}.{nearest(method, METHODS)}"
        )
    if config.rank is None and config.kept is None and config.explained_variance is None:
        if method in ("thin", "svd_lora"):
            return dataclasses.replace(config, kept=0.6)
        return dataclasses.replace(config, explained_variance=0.9)
    return config


def _convert_published(
    model: nn.Module,
    layers: dict[str, nn.Linear],
    config: ThinConfig,
    method: Method,
    compressors: Mapping[str, TuckerCompressor | HosvdCompressor] | None,
) -> Converted:
    """The paper's choices: SVD of each weight, Tucker form of each input."""

    def spectra() -> dict[str, Tensor]:
        return {n: torch.linalg.svdvals(layers[n].weight).square() for n in names}

    names = [n for n in layers if compressors is None or n in compressors]
    dense = method in ("asi", "amc")
    ranks = {} if dense else choose_ranks({n: layers[n] for n in names}, spectra, config, cap=False)
    for name in names:
        layer = layers.pop(name)
        compressor = compressors[name] if compressors else None
        if dense:
            assert compressor is not None
            new: nn.Module = CompressedLinear(
                layer.in_features, layer.out_features, layer.bias is not None, compressor=compressor, device="meta"
            )
            new.weight, new.bias = layer.weight, layer.bias
        else:
            assert not isinstance(compressor, HosvdCompressor)
            new = FactorLinear(
                layer.in_features,
                layer.out_features,
                ranks[name],
                layer.bias is not None,
                compressor=compressor,
                device="meta",
                dtype=layer.weight.dtype,
            )
            new.set_(
                *truncated_svd(layer.weight, rank=ranks[name]), None if layer.bias is None else layer.bias.detach()
            )
        put_(model, layer, new)
        yield name, new, ranks.get(name), compressor.ranks if compressor else None


def _weight_bytes(layer: nn.Module) -> int:
    """Bytes of what stands for the weight."""
    if isinstance(layer, ThinLinear):
        return layer.kept_elements * layer.left.element_size()
    assert isinstance(layer, nn.Linear)
    return layer.weight.numel() * layer.weight.element_size()
