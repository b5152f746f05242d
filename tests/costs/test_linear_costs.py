"""The formulas against what is counted on the real layers."""

from __future__ import annotations

import subprocess
import sys
from math import prod

import pytest
import torch
from torch import Tensor, nn

from thintune import costs
from thintune.linalg import warm_subspace_step
from thintune.linalg.tucker import clip_ranks
from thintune.measure import SavedActivations, count_flops
from thintune.nn import CompressedLinear, FactorLinear, SubspaceLinear, ThinLinear, TuckerCompressor

I, O, K, R = 24, 36, 7, 5  # noqa: E741
LEADING = [(11,), (3, 5), (2, 5, 3)]
TYPES = [(torch.float32, 4), (torch.float64, 8)]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def fill(layer: nn.Module) -> nn.Module:
    """Real values: thin layers are made empty."""
    for parameter in layer.parameters():
        parameter.data.copy_(draw(*parameter.shape))
    return layer


def subspace(**kind) -> nn.Module:
    layer = fill(SubspaceLinear(I, O, K, activation_rank=R, **kind))
    layer.update.data.zero_()
    return layer


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    with SavedActivations(exclude=layer) as saved:
        output = layer(x)
    assert output.requires_grad
    return saved.bytes


def flops(layer: nn.Module, x: Tensor, *, to_input: bool) -> tuple[int, int]:
    """Of the forward and of the backward pass."""
    outputs: list[Tensor] = []
    x = x.requires_grad_(to_input)
    forward = count_flops(lambda: outputs.append(layer(x)))
    return forward, count_flops(lambda: outputs[0].backward(torch.ones_like(outputs[0])))


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize(("dtype", "size"), TYPES)
def test_saved_bytes_of_layers_that_keep_rows(leading, dtype, size):
    x, rows = draw(*leading, I, dtype=dtype), prod(leading)
    assert saved_bytes(nn.Linear(I, O, dtype=dtype), x) == costs.dense_saved_bytes(rows, I, size)
    assert saved_bytes(fill(FactorLinear(I, O, K, dtype=dtype)), x) == costs.factor_saved_bytes(rows, I, size)
    assert saved_bytes(subspace(dtype=dtype), x) == costs.subspace_saved_bytes(rows, R, size)


def compressor(shape: tuple[int, ...], asked: tuple[int, ...]) -> tuple[TuckerCompressor, tuple[int, ...]]:
    ranks = clip_ranks(shape, asked)
    return TuckerCompressor(shape, ranks), ranks


TUCKER = [((6, 5, I), (4, 3, R)), ((4, 3, 5, I), (2, 3, 2, 6)), ((30, 7, I), (2, 2, 3)), ((3, 4, I), (3, 4, 20))]


@pytest.mark.parametrize(("shape", "asked"), TUCKER)
@pytest.mark.parametrize(("dtype", "size"), TYPES)
def test_saved_bytes_of_a_tucker_form(shape, asked, dtype, size):
    form, ranks = compressor(shape, asked)
    x = draw(*shape, dtype=dtype)
    for layer in (
        fill(CompressedLinear(I, O, compressor=form, dtype=dtype)),
        fill(FactorLinear(I, O, K, compressor=form, dtype=dtype)),
    ):
        assert saved_bytes(layer.to(dtype), x) == costs.tucker_saved_bytes(shape, ranks, size)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "size"), TYPES)
def test_parameter_bytes(bias, dtype, size):
    def held(tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    assert held(nn.Linear(I, O, bias, dtype=dtype).parameters()) == costs.dense_parameter_bytes(I, O, bias, size)
    thin = costs.thin_parameter_bytes(I, O, K, bias, size)
    assert held(ThinLinear(I, O, K, bias, dtype=dtype).parameters()) == thin
    layer = SubspaceLinear(I, O, K, bias, activation_rank=R, dtype=dtype)
    assert held([*layer.parameters(), *layer.buffers()]) == thin + costs.subspace_state_bytes(I, O, R, size)


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("to_input", [True, False])
def test_flops_of_layers_that_keep_rows(leading, to_input):
    x, rows = draw(*leading, I), prod(leading)

    forward, backward = flops(nn.Linear(I, O), x, to_input=to_input)
    assert forward == costs.dense_forward_flops(rows, I, O)
    assert backward == costs.dense_weight_gradient_flops(rows, I, O) + (
        to_input * costs.dense_input_gradient_flops(rows, I, O)
    )

    forward, backward = flops(subspace(), x, to_input=to_input)
    assert forward == costs.subspace_forward_flops(rows, I, O, K, R)
    assert backward == costs.subspace_weight_gradient_flops(rows, O, R) + (
        to_input * costs.subspace_input_gradient_flops(rows, I, O, K)
    )

    forward, backward = flops(fill(FactorLinear(I, O, K)), x, to_input=to_input)
    assert forward == costs.thin_forward_flops(rows, I, O, K)
    inner = 2 * rows * O * K  # G L belongs to the input gradient, and is needed without it as well
    assert backward == costs.factor_weight_gradient_flops(rows, I, O, K) + (
        costs.factor_input_gradient_flops(rows, I, O, K) if to_input else inner
    )


def test_flops_of_inference_are_those_of_two_thin_products():
    for layer in (subspace(), fill(FactorLinear(I, O, K)), fill(ThinLinear(I, O, K))):
        with torch.no_grad():
            assert count_flops(lambda layer=layer: layer(draw(3, 5, I))) == costs.thin_forward_flops(15, I, O, K)


@pytest.mark.parametrize(("shape", "asked"), TUCKER)
def test_flops_of_layers_that_keep_a_tucker_form(shape, asked):
    form, ranks = compressor(shape, asked)
    x, rows = draw(*shape), prod(shape[:-1])

    forward, backward = flops(CompressedLinear(I, O, compressor=form), x, to_input=True)
    assert forward == costs.dense_forward_flops(rows, I, O) + costs.compression_flops(shape, ranks)
    assert backward == costs.dense_input_gradient_flops(rows, I, O) + (
        costs.tucker_dense_weight_gradient_flops(shape, ranks, O)
    )

    forward, backward = flops(fill(FactorLinear(I, O, K, compressor=form)), x, to_input=True)
    assert forward == costs.thin_forward_flops(rows, I, O, K) + costs.compression_flops(shape, ranks)
    assert backward == costs.factor_input_gradient_flops(rows, I, O, K) + (
        costs.factor_tucker_weight_gradient_flops(shape, ranks, O, K)
    )


def test_both_orders_of_the_tucker_contraction_occur():
    direct = {
        2 * prod(shape[:-1]) * O * clip_ranks(shape, asked)[-1]
        < costs.tucker_contraction_flops(shape, clip_ranks(shape, asked), O)
        for shape, asked in TUCKER
    }
    assert direct == {True, False}


@pytest.mark.parametrize("sizes", [(I, O, K, R), (I, O, 1, 1), (O, I, K, R), (30, 9, 9, 4)])
def test_flops_of_the_fold(sizes):
    i, o, k, r = sizes
    left, basis = (torch.linalg.qr(draw(n, m, dtype=torch.float64))[0] for n, m in ((o, k), (i, r)))
    right, step = draw(k, i, dtype=torch.float64), 1e-3 * draw(o, r, dtype=torch.float64)
    counted = count_flops(lambda: warm_subspace_step(left, right, step, basis))
    assert counted == costs.fold_flops(i, o, k, r)


def test_results_are_integers_even_for_sizes_beyond_64_bits():
    assert costs.dense_forward_flops(2**40, 2**20, 2**20) == 2**81
    assert isinstance(costs.tucker_contraction_flops((3, 4, 5), (2, 2, 2), 7), int)


def test_importing_the_formulas_needs_no_torch_of_its_own():
    source = "import sys; sys.modules['torch'] = None; import importlib.util as u; "
    source += f"s = u.spec_from_file_location('linear', {costs.linear.__file__!r}); "
    source += "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.fold_flops(3, 4, 2, 1))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert int(done.stdout) == costs.fold_flops(3, 4, 2, 1)
