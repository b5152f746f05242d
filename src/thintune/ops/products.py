"""Products with weights by the fastest kernel at hand.

On a CPU in float32 that is oneDNN's, which torch carries for its compiler: on the shapes of thin layers (a few hundred
rows, one side a rank) it runs nearer to the peak than the BLAS behind `torch.mm`, and takes bias and GELU along.
Everywhere else, and wherever a graph is recorded, these are torch's own functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W.T + b without a graph.

    Args:
        x: (M, I).
        weight: (O, I), any strides.
        bias: (O,) or None.

    Returns:
        (M, O), fresh memory.
    """
    if _has_kernel(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Exact GELU of `linear`."""
    if _has_kernel(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")
    return torch.ops.aten.gelu_(F.linear(x, weight, bias))


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    return (
        _BUILT_IN
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch.onnx.is_in_onnx_export()
        and type(x) is Tensor
        and x.dim() == 2
        and len(x) > 0
    )


_BUILT_IN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
