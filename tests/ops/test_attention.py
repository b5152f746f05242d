"""Attention without autograd against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from thintune.ops.attention import attention_gradients_, attention_into


@pytest.mark.parametrize(("images", "tokens", "heads", "width"), [(1, 5, 1, 4), (3, 7, 2, 6), (2, 33, 4, 32)])
@pytest.mark.parametrize("scores", [1, 70, 1 << 20])
def test_values_and_gradients_equal_those_of_scaled_dot_product_attention(
    images, tokens, heads, width, scores, monkeypatch
):
    monkeypatch.setattr("thintune.ops.attention.MOST_SCORES", scores)
    packed = torch.randn(images * tokens, 3 * width, dtype=torch.float64)
    grad = torch.randn(images * tokens, width, dtype=torch.float64)
    leaf = packed.clone().requires_grad_()
    q, k, v = leaf.view(images, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).reshape(-1, width)
    mixed.backward(grad)
    out = torch.empty_like(grad)
    attention_into(out, packed, tokens, heads, 0.3)
    torch.testing.assert_close(out, mixed.detach(), rtol=0, atol=1e-12)
    attention_gradients_(packed, grad, tokens, heads, 0.3)
    torch.testing.assert_close(packed, leaf.grad, rtol=0, atol=1e-12)
