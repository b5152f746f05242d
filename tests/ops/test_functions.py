import pytest
import torch

from thintune import ops
from thintune.linalg import orthonormalize, reconstruct, st_hosvd
from thintune.ops import reference, tucker_gradient

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
    close(reconstruct(core, modes), x)
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


def moved_function(x, left, right, bias, update, basis):
    """What `subspace_linear` stands for where the update is not zero."""
    return torch.nn.functional.linear(x, left @ right + update @ basis.T, bias)


@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("r", [1, 3, I])
def test_the_gradient_of_the_update_is_the_slope_of_the_moved_weight(shape, r):
    left, right, bias = factors()
    basis, x, loss = orthonormalize(rand(I, r)), rand(*shape), rand(*shape[:-1], O, seed=5)
    update = torch.zeros(O, r, dtype=torch.float64, requires_grad=True)
    (ops.subspace_linear(x, left, right, bias, update, basis).tanh() * loss).sum().backward()
    slopes = torch.zeros(O, r, dtype=torch.float64)
    for index in range(slopes.numel()):
        step = torch.zeros(O, r, dtype=torch.float64)
        step.view(-1)[index] = 1e-5
        ends = [(moved_function(x, left, right, bias, sign * step, basis).tanh() * loss).sum() for sign in (1, -1)]
        slopes.view(-1)[index] = (ends[0] - ends[1]) / 2e-5
    close(update.grad, slopes, 1e-7)


@pytest.mark.parametrize("shape", INPUTS)
def test_the_compressed_function_passes_gradcheck_at_full_ranks(shape):
    weight, bias, x = rand(O, I, seed=3).requires_grad_(), rand(O).requires_grad_(), rand(*shape)
    core, modes = st_hosvd(x, shape)
    close(reconstruct(core, modes), x)
    assert torch.autograd.gradcheck(lambda w, b: ops.compressed_linear(x, w, b, core, modes), (weight, bias))
    assert torch.autograd.gradcheck(
        lambda v: ops.compressed_linear(v, weight.detach(), None, core, modes), x.requires_grad_()
    )


def test_functions_without_bias_have_the_same_gradients():
    left, right, _ = (t.requires_grad_() for t in factors())
    weight = rand(O, I, seed=3).requires_grad_()
    x, grad = rand(2, 3, 4, I).requires_grad_(), rand(2, 3, 4, O, seed=1)
    core, modes = st_hosvd(x.detach(), (2, 2, 2, 3))
    plain = left.detach(), right.detach()
    for form in ((), (core, modes)):
        ops.factor_linear(x, left, right, None, *form).backward(grad)
        expected = reference.factor_gradients(x.detach(), *plain, grad, *form)
        for tensor, wanted in zip((x, left, right), expected, strict=False):
            close(tensor.grad, wanted)
            tensor.grad = None
    ops.compressed_linear(x, weight, None, core, modes).backward(grad)
    close(weight.grad, reference.compressed_gradients(weight.detach(), grad, core, modes)[1])


@pytest.mark.parametrize(("shape", "ranks", "first"), [((5, 7, I), (1, 1, 2), "G"), ((3, 5, I), (3, 5, 2), "core")])
def test_both_orders_of_contraction_give_the_weight_gradient(shape, ranks, first, monkeypatch):
    x, grad = rand(*shape), rand(*shape[:-1], O, seed=2)
    core, modes = st_hosvd(x, ranks)
    met = []
    plain = tucker_gradient.mode_dot
    monkeypatch.setattr(tucker_gradient, "mode_dot", lambda t, *rest: met.append(t.shape) or plain(t, *rest))
    a = ops.tucker_weight_gradient(grad, core, modes)
    assert met[0] == {"G": grad.shape, "core": core.shape}[first]
    assert a.shape == (O, modes[-1].shape[1])
    close(a @ modes[-1].T, reference.weight_gradient(grad, reconstruct(core, modes)))


@pytest.mark.parametrize("kind", ["subspace", "factor", "tucker", "compressed"])
def test_strided_inputs_and_gradients_give_the_same(kind):
    left, right, bias = factors()
    weight, basis = rand(O, I, seed=3), orthonormalize(rand(I, 2))
    strided, grad = rand(I, 4, 5).permute(1, 2, 0), rand(O, 5, 4).permute(2, 1, 0)
    core, modes = st_hosvd(strided.contiguous(), (2, 2, 3))
    results = []
    for x, g in ((strided, grad), (strided.contiguous(), grad.contiguous())):
        inputs = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, left, right, bias, weight)]
        v, le, ri, b, w = inputs
        update = torch.zeros(O, 2, dtype=torch.float64, requires_grad=True)
        assert v.is_contiguous() == x.is_contiguous()
        y = {
            "subspace": lambda v=v, b=b, u=update: ops.subspace_linear(v, left, right, b, u, basis),
            "factor": lambda v=v, le=le, ri=ri, b=b: ops.factor_linear(v, le, ri, b),
            "tucker": lambda v=v, le=le, ri=ri, b=b: ops.factor_linear(v, le, ri, b, core, modes),
            "compressed": lambda v=v, w=w, b=b: ops.compressed_linear(v, w, b, core, modes),
        }[kind]()
        y.backward(g)
        results.append([y, *(t.grad for t in (*inputs, update) if t.grad is not None)])
    assert len(results[0]) == {"subspace": 4, "factor": 5, "tucker": 5, "compressed": 4}[kind]
    for found, expected in zip(*results, strict=True):
        close(found, expected, 1e-12)
