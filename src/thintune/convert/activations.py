"""Tucker ranks and first bases of the layers' inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from thintune.config import ThinConfig
from thintune.convert.calibration import observe
from thintune.errors import ConversionError, nearest
from thintune.linalg import mode_ranks, st_hosvd
from thintune.nn import TuckerCompressor


def tucker_compressors(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batch: Any,
    config: ThinConfig,
    planned: Mapping[str, tuple[int, ...]] | None,
) -> dict[str, TuckerCompressor]:
    """A compressor for each layer that the batch reaches, its bases those of this batch.

    Args:
        model: holds the layers.
        layers: by name.
        batch: inputs of the model, as large as a micro-batch of training, since the batch mode has a rank as well.
        config: its activation_explained_variance gives the ranks, unless
        planned: names them, layer by layer; the batch mode first, the feature mode last.

    Raises:
        ConversionError: a plan that names an unknown layer, misses one, or has the wrong number of modes.
    """
    problems = [
        f"{name!r} is no converted layer.{nearest(name, layers)}" for name in planned or {} if name not in layers
    ]
    found: dict[str, TuckerCompressor] = {}

    def visit(name: str, x: Tensor) -> None:
        ranks = mode_ranks(x, config.activation_explained_variance) if planned is None else planned.get(name)
        if ranks is None or len(ranks) != x.ndim:
            got = "none" if ranks is None else str(tuple(ranks))
            problems.append(f"{name}: expected {x.ndim} ranks for an input of shape {tuple(x.shape)}, got {got}.")
            return
        _, factors = st_hosvd(x, ranks)
        compressor = TuckerCompressor(x.shape, [f.shape[1] for f in factors]).to(x.device, x.dtype)
        compressor.start_(factors)
        found[name] = compressor

    observe(model, dict(layers), [batch], visit)
    if problems:
        raise ConversionError("activation_ranks: " + " ".join(problems))
    return found
