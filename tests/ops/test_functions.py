import pytest
import torch

from thintune import ops
from thintune.linalg import orthonormalize, reconstruct, st_hosvd
from thintune.ops import reference

O, I, K = 7, 6, 3  # noqa: E741 - the letters of the equations
INPUTS = [(5, I), (4, 5, I), (2, 3, 4, I), (1, 5, I)]


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def factors(k=K):
    return orthonormalize(rand(O, k)), rand(k, I), rand(O)


def close(found, expected, bound=1e-10):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < bound


@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_subspace_function_equals_its_reference(shape, with_bias):
    left, right, bias = factors()
    bias = bias.requires_grad_() if with_bias else None
    basis = orthonormalize(rand(I, 2))
    update = torch.zeros(O, 2, dtype=torch.float64, requires_grad=True)
    x = rand(*shape).requires_grad_()
    y = ops.subspace_linear(x, left, right, bias, update, basis)
    close(y, x @ (left @ right).T + (0 if bias is None else bias))
    grad = rand(*y.shape, seed=1)
    y.backward(grad)
    grad_x, grad_bias, grad_update = reference.subspace_gradients(x.detach(), left, right, basis, grad)
    close(x.grad, grad_x)
    close(update.grad, grad_update)
    if bias is not None:
        close(bias.grad, grad_bias)


@pytest.mark.parametrize("shape", INPUTS)
def test_at_a_full_basis_the_update_takes_the_dense_gradient(shape):
    left, right, bias = factors(min(O, I))
    basis = orthonormalize(rand(I, I))
    update = torch.zeros(O, I, dtype=torch.float64, requires_grad=True)
    x = rand(*shape)
    weight = (left @ right).requires_grad_()
    ops.subspace_linear(x, left, right, bias, update, basis).square().sum().backward()
    torch.nn.functional.linear(x, weight, bias).square().sum().backward()
    close(update.grad @ basis.T, weight.grad)


def test_the_subspace_function_passes_gradcheck():
    left, right, bias = factors()
    basis, update = orthonormalize(rand(I, 2)), torch.zeros(O, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, b: ops.subspace_linear(x, left, right, b, update, basis),
        (rand(4, 5, I).requires_grad_(), bias.requires_grad_()),
    )


@pytest.mark.parametrize("shape", INPUTS)
def test_the_factor_function_passes_gradcheck_whole_and_at_full_ranks(shape):
    left, right, bias = (t.requires_grad_() for t in factors())
    x = rand(*shape).requires_grad_()
    assert torch.autograd.gradcheck(ops.factor_linear, (x, left, right, bias))
    core, modes = st_hosvd(x.detach(), shape)
    if (reconstruct(core, modes) - x).abs().max() < 1e-10:
        assert torch.autograd.gradcheck(lambda *a: ops.factor_linear(x.detach(), *a, core, modes), (left, right, bias))


@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("rank", [1, 2])
def test_truncated_functions_equal_their_references(shape, rank):
    left, right, bias = (t.requires_grad_() for t in factors())
    weight = rand(O, I, seed=3).requires_grad_()
    x = rand(*shape).requires_grad_()
    core, modes = st_hosvd(x.detach(), [rank] * len(shape))
    y = ops.factor_linear(x, left, right, bias, core, modes)
    grad = rand(*y.shape, seed=1)
    y.backward(grad)
    expected = reference.factor_gradients(x.detach(), left.detach(), right.detach(), grad, core, modes)
    for found, wanted in zip((x.grad, left.grad, right.grad, bias.grad), expected, strict=True):
        close(found, wanted)
    x.grad = bias.grad = None
    ops.compressed_linear(x, weight, bias, core, modes).backward(grad)
    expected = reference.compressed_gradients(weight.detach(), grad, core, modes)
    for found, wanted in zip((x.grad, weight.grad, bias.grad), expected, strict=True):
        close(found, wanted)


@pytest.mark.parametrize("ranks", [(1, 1, 2), (5, 7, 2)])
def test_both_orders_of_contraction_give_the_weight_gradient(ranks):
    x, grad = rand(5, 7, I), rand(5, 7, O, seed=2)
    core, modes = st_hosvd(x, ranks)
    a = ops.tucker_weight_gradient(grad, core, modes)
    assert a.shape == (O, modes[-1].shape[1])
    close(a @ modes[-1].T, reference.weight_gradient(grad, reconstruct(core, modes)))


def test_a_strided_input_gives_the_same():
    left, right, bias = factors()
    basis, update = orthonormalize(rand(I, 2)), torch.zeros(O, 2, dtype=torch.float64, requires_grad=True)
    x = rand(I, 4, 5).permute(1, 2, 0)
    found = ops.subspace_linear(x, left, right, bias, update, basis)
    close(found, ops.subspace_linear(x.contiguous(), left, right, bias, update, basis), 1e-13)
