"""Products with weights by the fastest kernel at hand.

On a CPU in float32 that is oneDNN's, which torch carries for its compiler: on the shapes of thin layers (a few hundred
rows, one side a rank) it runs nearer to the peak than the BLAS behind `torch.mm`, and takes the bias along.
Everywhere else, and wherever a graph is recorded, these are torch's own functions.

oneDNN generates code for every shape that it meets, about 0.6 MB each, which is a lot where every layer has a rank of
its own: `limit_kernels` says how many shapes may have it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from thintune.ops.workspace import workspace


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scratch: str | None = None) -> Tensor:
    """X W.T + b without a graph.

    Args:
        x: (M, I).
        weight: (O, I), any strides.
        bias: (O,) or None.
        scratch: where a name is given the result may lie in that buffer, valid until the name is taken again.

    Returns:
        (M, O).
    """
    if _has_kernel(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if scratch is None or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    out = workspace.take(scratch, (len(x), len(weight)), x)
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear` into memory that is there: for results so large that fresh pages would cost more than another kernel."""
    return torch.addmm(bias, x, weight.T, out=out)


def limit_kernels(shapes: int | None) -> None:
    """Lets no more than the first so many shapes of this process have a kernel of their own from here on; None: all."""
    _kernels.limit = _REMEMBERED if shapes is None else shapes


_REMEMBERED = 1024
"""Shapes whose kernels oneDNN keeps."""


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Inside, no further shape gets a kernel; also a decorator."""
    before, _kernels.limit = _kernels.limit, 0
    try:
        yield
    finally:
        _kernels.limit = before


class _Kernels:
    """Which shapes have met oneDNN."""

    def __init__(self) -> None:
        self.limit = _REMEMBERED
        self.met: set[tuple[object, ...]] = set()

    def admit(self, key: tuple[object, ...]) -> bool:
        """Whether this shape has a kernel, or gets one."""
        if key in self.met:
            return True
        if len(self.met) >= self.limit:
            return False
        self.met.add(key)
        return True


_kernels = _Kernels()


def _has_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        _BUILT_IN
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and type(x) is Tensor
        and x.dim() == 2
        and len(x) > 0
        and _kernels.admit((x.shape, x.stride(), weight.shape, weight.stride(), bias is None))
    )


_BUILT_IN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
