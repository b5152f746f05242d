"""Counted FLOPs against closed forms; 1 multiply-add = 2 FLOPs."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from thintune.measure import count_flops

M, IN, OUT = 11, 5, 7
BATCH, HEADS, ROWS, COLUMNS, FEATURES = 2, 3, 5, 7, 4
SCORES = 2 * BATCH * HEADS * ROWS * COLUMNS * FEATURES


@pytest.mark.parametrize(("input_grad", "products"), [(True, 3), (False, 2)])
def test_a_linear_layer_costs_one_product_forward_and_one_for_each_gradient(input_grad, products):
    layer = nn.Linear(IN, OUT)
    x = torch.randn(M, IN, requires_grad=input_grad)
    assert count_flops(lambda: layer(x).sum().backward()) == products * 2 * M * IN * OUT


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_counts_too(context):
    layer = nn.Linear(IN, OUT)
    with context():
        assert count_flops(lambda: layer(torch.randn(M, IN))) == 2 * M * IN * OUT


def attention_inputs(heads_kv: int = HEADS) -> list[torch.Tensor]:
    shapes = [(BATCH, HEADS, ROWS, FEATURES), *[(BATCH, heads_kv, COLUMNS, FEATURES)] * 2]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.zeros(ROWS, COLUMNS)}])
def test_cpu_attention_is_two_products_forward_and_five_backward(options):
    inputs = attention_inputs()
    out = functional.scaled_dot_product_attention(*inputs, **options)
    assert "FlashAttentionForCpu" in out.grad_fn.name()  # the operator that this is about
    assert count_flops(lambda: functional.scaled_dot_product_attention(*inputs, **options)) == 2 * SCORES
    assert count_flops(lambda: out.sum().backward()) == 5 * SCORES


def test_grouped_heads_count_as_those_of_the_query():
    inputs = attention_inputs(heads_kv=1)
    forward = count_flops(lambda: functional.scaled_dot_product_attention(*inputs, enable_gqa=True))
    assert forward == 2 * SCORES


def test_attention_with_dropout_is_not_counted_twice():
    """It falls back to plain products, which save the scores: four products backward."""
    inputs = attention_inputs()
    step = count_flops(lambda: functional.scaled_dot_product_attention(*inputs, dropout_p=0.5).sum().backward())
    assert step == (2 + 4) * SCORES


def test_products_inside_a_custom_backward_are_counted():
    class Thin(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, left):
            ctx.save_for_backward(x, left)
            return x @ left.T

        @staticmethod
        def backward(ctx, grad):
            x, left = ctx.saved_tensors
            return grad @ left, torch.zeros(OUT, IN).addmm_(grad.T, x)

    x, left = torch.randn(M, IN, requires_grad=True), torch.randn(OUT, IN, requires_grad=True)
    assert count_flops(lambda: Thin.apply(x, left).sum().backward()) == 3 * 2 * M * IN * OUT


VECTOR, MATRIX, STACK = torch.ones(IN), torch.ones(M, IN), torch.ones(3, M, IN)


@pytest.mark.parametrize(
    ("flops", "fn"),
    [
        (2 * M * IN * OUT, lambda: torch.ones(M, OUT).addmm_(MATRIX, torch.ones(IN, OUT))),
        (2 * M * IN * OUT, lambda: torch.addmm(torch.ones(OUT), MATRIX, torch.ones(IN, OUT))),
        (3 * 2 * M * IN * OUT, lambda: torch.ones(3, M, OUT).baddbmm_(STACK, torch.ones(3, IN, OUT))),
        (3 * 2 * M * IN * OUT, lambda: torch.addbmm(torch.ones(M, OUT), STACK, torch.ones(3, IN, OUT))),
        (3 * 2 * M * IN * OUT, lambda: torch.ones(M, OUT).addbmm_(STACK, torch.ones(3, IN, OUT))),
        (3 * 2 * M * IN * OUT, lambda: torch.einsum("bmi,io->bmo", STACK, torch.ones(IN, OUT))),
        (2 * M * IN, lambda: MATRIX @ VECTOR),
        (2 * M * IN, lambda: torch.addmv(torch.ones(M), MATRIX, VECTOR)),
        (2 * M * IN, lambda: torch.ones(M).addmv_(MATRIX, VECTOR)),
        (2 * IN, lambda: VECTOR.dot(VECTOR)),
        (2 * IN, lambda: torch.vdot(VECTOR, VECTOR)),
        (2 * M * IN, lambda: torch.addr(MATRIX, torch.ones(M), VECTOR)),
        (2 * M * IN, lambda: torch.zeros(M, IN).addr_(torch.ones(M), VECTOR)),
        (0, lambda: torch.linalg.qr(MATRIX)),
        (0, lambda: None),
    ],
)
def test_each_product_is_counted_once(flops, fn):
    assert count_flops(fn) == flops


def test_the_opaque_inference_path_of_torch_attention_is_counted():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    rows = 2 * 5
    linears = 2 * rows * (3 * 8 * 8 + 8 * 8 + 2 * 8 * 16)
    attention = 2 * 2 * (2 * 2 * 5 * 5 * 4)
    with torch.no_grad():
        assert count_flops(lambda: layer(x)) == linears + attention


@pytest.fixture(params=[True, False])
def fast_path(request):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(request.param)
    yield request.param
    torch.backends.mha.set_fastpath_enabled(before)


def test_the_switch_of_the_inference_path_is_put_back(fast_path):
    assert count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 60
    assert torch.backends.mha.get_fastpath_enabled() is fast_path


def test_an_error_of_the_callable_comes_through_and_leaves_no_trace(fast_path):
    with pytest.raises(ZeroDivisionError):
        count_flops(lambda: 1 / 0)
    assert torch.backends.mha.get_fastpath_enabled() is fast_path
    assert count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 60
