"""The formulas of a whole vision transformer against what autograd keeps of a real one."""

import pytest
import timm
import torch

import thintune as tt
from thintune import ops
from thintune.config import LoraConfig
from thintune.costs import vit
from thintune.measure import SavedActivations
from thintune.train.lora import inject_lora_

SHAPE = vit.VitShape(width=24, depth=3, heads=3, hidden=96, image_size=28, patch_size=7, classes=5)
IMAGES = 3


def model():
    torch.manual_seed(0)
    options = {"depth": 3, "embed_dim": 24, "num_heads": 3, "patch_size": 7, "img_size": 28}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **options)


def saved(found):
    ops.release_buffers()
    with SavedActivations(exclude=found) as watch:
        found(torch.randn(IMAGES, 3, 28, 28)).sum()
    return watch.bytes


def test_parameters():
    found = model()
    assert SHAPE.parameters == sum(p.numel() for p in found.parameters())
    linears = sum(m.weight.numel() for n, m in found.named_modules() if isinstance(m, torch.nn.Linear) and n != "head")
    assert SHAPE.linear_parameters == linears


def test_dense():
    assert saved(model()) == vit.saved_bytes(SHAPE, IMAGES)


def test_checkpointing_keeps_the_input_of_every_block_until_one_is_computed_again():
    found = model()
    found.set_grad_checkpointing(True)
    inside = 4 * IMAGES * vit.dense_block_saved_values(SHAPE)
    assert saved(found) == vit.saved_bytes(SHAPE, IMAGES, checkpointing=True) - inside


def test_lora():
    found = model()
    inject_lora_(found, LoraConfig(rank=4), "head")
    block = found.blocks[1]
    with SavedActivations(exclude=found) as watch:
        block(torch.randn(IMAGES, SHAPE.tokens, 24, requires_grad=True)).sum()
    assert watch.bytes == 4 * IMAGES * vit.dense_block_saved_values(SHAPE, adapter_rank=4)


def test_thin():
    found = model()
    config = tt.ThinConfig(rank=6, exclude_modules=("head",), activation_rank=5)
    tt.convert_(found, config, calibration=[torch.randn(4, 3, 28, 28)])
    assert saved(found) == vit.lean_saved_bytes(SHAPE, IMAGES, (6, 6, 6, 6), 5)


@pytest.mark.parametrize("kept", [0.6, 0.4, 0.25])
def test_ranks_keep_at_most_the_share(kept):
    ranks = vit.thin_ranks(SHAPE, kept)
    factors = sum(k * (a.in_features + a.out_features) for a, k in zip(SHAPE.layers, ranks, strict=True))
    assert factors <= kept * SHAPE.linear_parameters / SHAPE.depth


def test_a_thin_model_with_lean_blocks_peaks_far_below_a_dense_one():
    base = vit.VitShape(width=768, depth=12, heads=12, hidden=3072, image_size=224, patch_size=16, classes=100)
    thin = vit.thin_peak_bytes(base, 2, vit.thin_ranks(base, 0.4), 32)
    halved = vit.thin_peak_bytes(base, 2, vit.thin_ranks(base, 0.4), 32, factor_dtype="bfloat16")
    assert halved < thin < vit.lora_peak_bytes(base, 1, 16) < vit.dense_peak_bytes(base, 1, 128)
    assert 60 * thin < vit.dense_peak_bytes(base, 128, 128)


def test_checkpointing_and_stepping_in_the_backward_pass_lower_the_dense_peak():
    plain = vit.dense_peak_bytes(SHAPE, 2, 4)
    assert vit.dense_peak_bytes(SHAPE, 2, 4, checkpointing=True) < plain
    assert vit.dense_peak_bytes(SHAPE, 2, 4, one_gradient_at_a_time=True) < plain
    assert vit.lora_peak_bytes(SHAPE, 2, 4, checkpointing=True) < vit.lora_peak_bytes(SHAPE, 2, 4)
