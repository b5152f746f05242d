"""The branches of a lean block against the same mathematics written with plain operations."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from thintune import ops
from thintune.ops import branches
from thintune.ops.normalize import dequantize_rows, quantize_rows
from thintune.ops.reference import attention_branch_reference, mlp_branch_reference
from thintune.ops.workspace import pool

B, N, D, HIDDEN, HEADS, K, R = 3, 5, 12, 20, 3, 4, 2


def weights(out_features, in_features):
    return ops.ThinWeights(
        torch.randn(out_features, K, dtype=torch.float64),
        torch.randn(K, in_features, dtype=torch.float64) / in_features,
        torch.randn(out_features, dtype=torch.float64).requires_grad_(),
        torch.zeros(out_features, R, dtype=torch.float64).requires_grad_(),
        torch.linalg.qr(torch.randn(in_features, R, dtype=torch.float64))[0],
    )


def arguments(kind, scaled, seed=0):
    torch.manual_seed(seed)
    inner = HIDDEN if kind == "mlp" else D
    x = torch.randn(B, N, D, dtype=torch.float64).requires_grad_()
    gamma, beta, scale = (torch.randn(D, dtype=torch.float64).requires_grad_() for _ in range(3))
    first = weights(HIDDEN if kind == "mlp" else 3 * D, D)
    return x, gamma, beta, scale if scaled else None, first, weights(D, inner)


def both(kind):
    if kind == "mlp":
        return ops.mlp_branch, mlp_branch_reference
    return ops.attention_branch, attention_branch_reference


def leaves(found):
    x, gamma, beta, scale, first, second = found
    chosen = [x, gamma, beta, first.bias, first.update, second.bias, second.update]
    return chosen if scale is None else [*chosen, scale]


def decibel(reference, tensor):
    return float(20 * torch.log10(reference.norm() / (reference - tensor).norm().clamp_min(1e-300)))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks that do not divide the rows."""
    monkeypatch.setattr(branches, "CHUNK_ROWS", 4)


@pytest.mark.parametrize("kind", ["mlp", "attention"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_output_and_every_gradient_equal_the_reference(kind, scaled, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(branches, "CHUNK_ROWS", 4)
    found = arguments(kind, scaled)
    options = ops.BranchOptions(eps=1e-5, exact_norm=True, heads=HEADS, scale=0.7)
    fast, slow = both(kind)
    weight = torch.randn(B, N, D, dtype=torch.float64)
    ours, theirs = fast(*found, options), slow(*found, options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    expected = torch.autograd.grad((theirs * weight).sum(), leaves(found))
    got = torch.autograd.grad((ours * weight).sum(), leaves(found))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_an_8_bit_norm_leaves_the_output_alone_and_every_gradient_above_40_db(kind):
    found = arguments(kind, scaled=True)
    fast, slow = both(kind)
    options = ops.BranchOptions(eps=1e-5, heads=HEADS, scale=0.7)
    ours, theirs = fast(*found, options), slow(*found, options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weight = torch.randn(B, N, D, dtype=torch.float64)
    expected = torch.autograd.grad((theirs * weight).sum(), leaves(found))
    got = torch.autograd.grad((ours * weight).sum(), leaves(found))
    levels = [decibel(one, other) for one, other in zip(expected, got, strict=True)]
    assert min(levels) > 40
    assert min(levels) < 200  # the copy is an 8-bit one


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_gradcheck(kind):
    found = arguments(kind, scaled=True)
    x, gamma, beta, scale, first, second = found
    options = ops.BranchOptions(eps=1e-5, exact_norm=True, heads=HEADS, scale=0.7)
    fast, _ = both(kind)

    def of(x, gamma, beta, scale, bias, other):
        return fast(x, gamma, beta, scale, first._replace(bias=bias), second._replace(bias=other), options)

    assert torch.autograd.gradcheck(of, (x, gamma, beta, scale, first.bias, second.bias))


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_both_layers_inputs_are_observed_whole(kind, small_chunks):
    found = arguments(kind, scaled=False)
    first, second = [], []
    options = ops.BranchOptions(
        eps=1e-5, heads=HEADS, scale=0.7, observe_first=lambda r: first.append(r.clone()), observe_second=second.append
    )
    fast, _ = both(kind)
    fast(*found, options)
    x, gamma, beta = found[:3]
    normal = F.layer_norm(x, (D,), gamma, beta, 1e-5).reshape(-1, D)
    torch.testing.assert_close(torch.cat(first), normal.detach())
    assert sum(len(rows) for rows in second) == B * N


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 7), width=st.integers(1, 9), size=st.floats(1e-6, 1e6), seed=st.integers(0, 1000))
def test_an_8_bit_copy_is_within_half_a_step(rows, width, size, seed):
    values = size * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    kept, step = quantize_rows(values)
    assert bool(((dequantize_rows(kept, step) - values).abs() <= 0.5001 * step).all())


def test_a_row_of_zeros_stays_zero():
    kept, step = quantize_rows(torch.zeros(2, 3))
    assert torch.equal(dequantize_rows(kept, step), torch.zeros(2, 3))


@pytest.mark.parametrize("affine", [True, False])
def test_lean_layer_norm(affine):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, dtype=torch.float64, requires_grad=True)
    pair = [torch.randn(16, dtype=torch.float64, requires_grad=True) for _ in range(2)] if affine else [None, None]
    weight = torch.randn(4, 3, 16, dtype=torch.float64)
    ours = ops.lean_layer_norm(x, *pair, 1e-6)
    theirs = F.layer_norm(x, (16,), *pair, 1e-6)
    torch.testing.assert_close(ours, theirs)
    wanted = [t for t in (x, *pair) if t is not None]
    expected = torch.autograd.grad((theirs * weight).sum(), wanted)
    got = torch.autograd.grad((ours * weight).sum(), wanted)
    assert min(decibel(one, other) for one, other in zip(expected, got, strict=True)) > 35


def test_a_graph_that_is_kept_keeps_its_memory():
    ops.release_buffers()
    found = arguments("mlp", scaled=False)
    options = ops.BranchOptions(eps=1e-5)
    out = ops.mlp_branch(*found, options)
    first = torch.autograd.grad(out.sum(), found[0], retain_graph=True)[0]
    assert pool().bytes == 0
    ops.mlp_branch(*found, options)  # would overwrite what was given back
    torch.testing.assert_close(torch.autograd.grad(out.sum(), found[0])[0], first, rtol=0, atol=0)
    assert pool().bytes > 0
    ops.release_buffers()
    assert pool().bytes == 0
