"""Patch embeddings as one product."""

import pytest
import timm
import torch
from torch import nn

from thintune.nn import PatchConv2d, make_patches_product_


@pytest.mark.parametrize("size", [(8, 8), (12, 8), (11, 9)])
def test_values_and_gradients_equal_the_convolution(size):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 4, 4, dtype=torch.float64)
    images = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, size[0] // 4, size[1] // 4, dtype=torch.float64)
    leaves = (images, conv.weight, conv.bias)
    plain = conv(images)
    expected = torch.autograd.grad((plain * weight).sum(), leaves)
    assert make_patches_product_(nn.Sequential(conv)) == ["0"]
    product = conv(images)
    torch.testing.assert_close(product, plain, rtol=0, atol=1e-12)
    for one, other in zip(torch.autograd.grad((product * weight).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_only_patches_that_do_not_overlap_are_changed():
    convs = nn.Sequential(
        nn.Conv2d(3, 4, 3, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 2, 2, groups=2), nn.Conv2d(8, 8, 2, 2)
    )
    assert make_patches_product_(convs) == ["3"]
    assert isinstance(convs[3], PatchConv2d)
    assert type(convs[0]) is nn.Conv2d


def test_a_vision_transformer_has_one():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)
    assert make_patches_product_(model) == ["patch_embed.proj"]
    names = set(model.state_dict())
    assert "patch_embed.proj.weight" in names
