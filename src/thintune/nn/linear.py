"""Linear layers of low rank or with a compressed input.

`ThinLinear` is what is shipped: two thin products and nothing else. Its two children train: `SubspaceLinear` in a
fixed subspace of the input (method `thin`), `FactorLinear` through both factors (methods `wsi` and `wasi`).
`CompressedLinear` is a dense layer that keeps a Tucker form of its input (methods `asi` and `amc`). Outside training
all of them are plain products, so export never meets an autograd function.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thintune import ops
from thintune.errors import ConfigError
from thintune.linalg import orthonormalize
from thintune.nn.compression import HosvdCompressor, TuckerCompressor


class ThinLinear(nn.Module):
    """y = (x R.T) L.T + b, holding L, R and b only.

    Args:
        in_features: I.
        out_features: O.
        rank: K, at most min(I, O).
        bias: whether there is a bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: a rank out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        limit = min(in_features, out_features)
        if not 1 <= rank <= limit:
            raise ConfigError(
                f"rank {rank} is not from 1 to min(in_features={in_features}, out_features={out_features}); "
                f"use rank <= {limit} or explained_variance."
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.left = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.right = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @torch.no_grad()
    def set_(self, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
        """Takes over factors and bias without copying them."""
        left, right = left.contiguous(), right.contiguous()  # as a checkpoint gives them back: the same kernels run
        self.left = nn.Parameter(left, requires_grad=self.left.requires_grad)
        self.right = nn.Parameter(right, requires_grad=self.right.requires_grad)
        if self.bias is not None and bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        """Maps (..., I) to (..., O)."""
        right, left = self.right.to(input.dtype), self.left.to(input.dtype)  # stored factors may be narrower
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.linear(F.linear(input, right), left, self.bias)
        rows = input.reshape(-1, self.in_features)
        return ops.linear(ops.linear(rows, right), left, self.bias).view(*input.shape[:-1], self.out_features)

    def training_only(self) -> set[str]:
        """Names of the tensors that inference does not need."""
        return set()

    @property
    def dense_elements(self) -> int:
        """Elements of the dense weight this layer stands for."""
        return self.in_features * self.out_features

    @property
    def kept_elements(self) -> int:
        """Elements of both factors, K (O + I)."""
        return self.rank * (self.in_features + self.out_features)

    def extra_repr(self) -> str:
        """Shape of the layer, for printing."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class SubspaceLinear(ThinLinear):
    """A thin layer that trains through a zero `update` (O, r) in a fixed basis (I, r) of its input.

    An optimizer that steps `update` steps the weight itself along `basis`, so that its moments, norms and learning
    rate mean what they mean for the dense weight; `thintune.optim.ThinStep` then folds the update into the factors
    by one exact subspace iteration and sets it back to zero. The factors take no gradient.

    Args:
        in_features: I.
        out_features: O.
        rank: K.
        bias: whether there is a bias.
        activation_rank: r, at most I.
        device: of the parameters.
        dtype: of the parameters.
    """

    basis: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        activation_rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias, device=device, dtype=dtype)
        self.left.requires_grad_(False)
        self.right.requires_grad_(False)
        r = min(activation_rank, in_features)
        self.update = nn.Parameter(torch.zeros(out_features, r, device=device, dtype=dtype))
        self.register_buffer("basis", torch.eye(in_features, r, device=device, dtype=dtype))
        self.capturing = False
        self._captured: Tensor | None = None

    @torch.no_grad()
    def store_(self, dtype: torch.dtype) -> None:
        """Keeps the factors in another type; computations, update, basis and bias stay in the layer's own."""
        for name in ("left", "right"):
            factor = getattr(self, name)
            setattr(self, name, nn.Parameter(factor.to(dtype).contiguous(), requires_grad=False))

    @torch.no_grad()
    def start_(self, basis: Tensor) -> None:
        """Takes over a basis (I, r) and sets the update to zero."""
        self.basis = basis.to(self.update.dtype)
        update = basis.new_zeros(self.out_features, basis.shape[1], dtype=self.update.dtype)
        self.update = nn.Parameter(update, requires_grad=self.update.requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        """Maps (..., I) to (..., O)."""
        if not (torch.is_grad_enabled() and self.update.requires_grad):
            return super().forward(input)
        if self.capturing:
            self.capture(input)
        return ops.subspace_linear(input, self.left, self.right, self.bias, self.update, self.basis)

    @torch.no_grad()
    def capture(self, x: Tensor) -> None:
        """Adds X.T X U (I, r) of this micro-batch; recomputation only scales the sum, which the basis ignores."""
        rows = x.reshape(-1, self.in_features)
        moved = rows.T @ (rows @ self.basis)
        self._captured = moved if self._captured is None else self._captured.add_(moved)

    @torch.no_grad()
    def refresh_basis_(self) -> Tensor | None:
        """Moves the basis by one subspace iteration on the captured inputs.

        Returns:
            (r, r), old coordinates to new ones, for whatever is kept in the basis; None where nothing was captured.
        """
        if self._captured is None:
            return None
        new = orthonormalize(self._captured)
        self._captured = None
        turn = self.basis.T @ new
        self.basis.copy_(new)
        return turn

    def training_only(self) -> set[str]:
        """Names of the tensors that inference does not need."""
        return {"update", "basis"}


class FactorLinear(ThinLinear):
    """A thin layer that trains both factors, keeping its input whole (`wsi`) or as a Tucker form (`wasi`).

    Args:
        in_features: I.
        out_features: O.
        rank: K.
        bias: whether there is a bias.
        compressor: of the input, or None to keep it whole.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        compressor: TuckerCompressor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias, device=device, dtype=dtype)
        self.compressor = compressor

    def forward(self, input: Tensor) -> Tensor:
        """Maps (..., I) to (..., O)."""
        if not (torch.is_grad_enabled() and self.left.requires_grad):
            return super().forward(input)
        if self.compressor is None:
            return ops.factor_linear(input, self.left, self.right, self.bias)
        core, factors = self.compressor(input)
        return ops.factor_linear(input, self.left, self.right, self.bias, core, factors)

    def training_only(self) -> set[str]:
        """Names of the tensors that inference does not need."""
        return {name for name, _ in self.named_buffers()}


class CompressedLinear(nn.Linear):
    """A dense layer that keeps a Tucker form of its input for the backward pass (ASI, AMC).

    Args:
        in_features: I.
        out_features: O.
        bias: whether there is a bias.
        compressor: of the input: warm-started (ASI, arXiv 2505.05086) or exact at every step (AMC, arXiv 2411.06346).
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        compressor: TuckerCompressor | HosvdCompressor,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.compressor = compressor

    def forward(self, input: Tensor) -> Tensor:
        """Maps (..., I) to (..., O)."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input)
        core, factors = self.compressor(input)
        return ops.compressed_linear(input, self.weight, self.bias, core, factors)

    def training_only(self) -> set[str]:
        """Names of the tensors that inference does not need."""
        return {name for name, _ in self.named_buffers()}
