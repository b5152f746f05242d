"""Lean blocks against the blocks they were, and what they keep."""

import copy
import pickle

import pytest
import timm
import torch
from torch.utils.checkpoint import checkpoint

import thintune as tt
from thintune import costs, ops
from thintune.config import TrainConfig
from thintune.convert.structure import describe, rebuild_
from thintune.measure import SavedActivations
from thintune.nn import LeanBlock, SubspaceLinear, make_lean_, make_plain_, why_not_lean
from thintune.optim import ThinStep, build_optimizer

DEPTH, WIDTH, HEADS, TOKENS, R = 2, 24, 3, 17, 5


def vit(**options):
    torch.manual_seed(0)
    options = {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": HEADS, "patch_size": 7, "img_size": 28, **options}
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **options)


def images(count=6):
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def thin(plain=False, **options):
    model = vit(**options)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    words = {"attention": "exact", "activation": "exact"} if plain else {}
    config = tt.ThinConfig(kept=0.5, exclude_modules=("head",), activation_rank=R, **words)
    return model, tt.convert_(model, config, calibration=[images()])


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"init_values": 0.1}])
@pytest.mark.parametrize("branches", [(True, True), (True, False), (False, True)])
def test_an_exact_lean_model_has_the_gradients_of_the_plain_one(options, branches):
    plain, _ = thin(plain=True, **options)
    plain.double()
    lean = copy.deepcopy(plain)
    for block in lean.blocks:
        make_lean_(block, attention=branches[0], activation=branches[1], norm=False)
    x = images().double()
    torch.testing.assert_close(lean(x), plain(x), rtol=0, atol=1e-12)
    ours, theirs = gradients(lean, x), gradients(plain, x)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-10)


def test_conversion_makes_blocks_lean_and_leaves_names_state_and_class():
    model, report = thin()
    plain, _ = thin(plain=True)
    assert report.blocks == {"blocks.0": None, "blocks.1": None}
    assert "2 of 2 blocks keep little" in str(report)
    assert all(isinstance(block, LeanBlock | timm.models.vision_transformer.Block) for block in model.blocks)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any(isinstance(block, LeanBlock) for block in plain.blocks)


def test_outside_training_a_lean_model_is_the_plain_one_bit_for_bit():
    (model, _), (plain, _) = thin(), thin(plain=True)
    with torch.no_grad():
        assert torch.equal(model(images()), plain(images()))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"drop_path_rate": 0.2}, "drop_path1 is in use"),
        ({"proj_drop_rate": 0.1}, "attn.proj_drop is in use"),
        ({"qk_norm": True}, "attn.q_norm is in use"),
        ({"act_layer": "gelu_tanh"}, "mlp.act is no exact GELU"),
    ],
)
def test_a_block_with_something_in_between_stays_plain_and_says_why(options, reason):
    model, report = thin(**options)
    assert report.blocks["blocks.1"] == reason
    assert f"blocks.1: not lean: {reason}" in str(report)
    assert not isinstance(model.blocks[1], LeanBlock)
    model(images()).sum().backward()


def test_a_layer_left_dense_keeps_its_block_plain():
    model = vit()
    config = tt.ThinConfig(kept=0.5, exclude_modules=("head", "blocks.0.mlp.fc1"))
    report = tt.convert_(model, config, calibration=[images()])
    assert report.blocks == {"blocks.0": "mlp.fc1 is no thin layer with a bias", "blocks.1": None}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("options", [{}, {"init_values": 0.1}])
def test_saved_bytes_equal_the_formula(norm, options):
    model, _ = thin(**options)
    count = 4
    expected = 0
    for block in model.blocks:
        make_lean_(block, norm=norm)
        for first, second in ((block.attn.qkv, block.attn.proj), (block.mlp.fc1, block.mlp.fc2)):
            expected += costs.lean_branch_saved_bytes(
                count * TOKENS, WIDTH, first.rank, R, R, second.rank if options else None, exact_norm=not norm
            )
    x = torch.randn(count, TOKENS, WIDTH, requires_grad=True)
    ops.release_buffers()  # larger ones of an earlier pass would serve, and count whole
    with SavedActivations(exclude=model) as saved:
        model.blocks(x)
    assert saved.bytes == expected


def test_checkpointing_composes():
    model, _ = thin()
    x = torch.randn(4, TOKENS, WIDTH, requires_grad=True)
    model.blocks(x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.blocks.named_parameters() if p.grad is not None}
    model.zero_grad()
    y = x
    for block in model.blocks:
        y = checkpoint(block, y, use_reentrant=False)
    y.square().sum().backward()
    for name, gradient in expected.items():
        assert torch.equal(dict(model.blocks.named_parameters())[name].grad, gradient), name


def test_an_attention_mask_takes_the_blocks_own_path():
    model, _ = thin()
    x = torch.randn(2, TOKENS, WIDTH)
    mask = torch.zeros(TOKENS, TOKENS).masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
    block = model.blocks[0]
    masked = block(x, attn_mask=mask)
    with torch.no_grad():
        torch.testing.assert_close(masked, block(x, attn_mask=mask))
    assert not torch.allclose(masked, block(x))


def test_structure_round_trip_and_merge():
    model, _ = thin()
    make_lean_(model.blocks[1], attention=False, norm=False)
    other = vit()
    rebuild_(other, describe(model))
    other.load_state_dict(model.state_dict(), assign=True)
    assert describe(other) == describe(model)
    assert (other.blocks[1].lean_attention, other.blocks[1].lean_norm) == (False, False)
    tt.merge_(other)
    assert not any(isinstance(block, LeanBlock) for block in other.blocks)
    torch.testing.assert_close(other(images()), model(images()), rtol=1e-4, atol=1e-4)


def test_plain_again_and_copies():
    model, _ = thin()
    block = copy.deepcopy(model.blocks[0])
    assert isinstance(block, LeanBlock) and why_not_lean(block) is None
    make_plain_(block)
    assert type(block) is timm.models.vision_transformer.Block
    assert not hasattr(block, "lean_norm")
    assert type(pickle.loads(pickle.dumps(block))) is type(block)


def test_factors_stored_in_bfloat16_train_and_come_back():
    model = vit()
    config = tt.ThinConfig(kept=0.5, exclude_modules=("head",), activation_rank=R, factor_dtype="bfloat16")
    report = tt.convert_(model, config, calibration=[images()])
    assert report.kept_weight_fraction <= 0.25
    layers = [m for m in model.modules() if isinstance(m, SubspaceLinear)]
    assert all(m.left.dtype == m.right.dtype == torch.bfloat16 for m in layers)
    assert all(m.update.dtype == m.basis.dtype == m.bias.dtype == torch.float32 for m in layers)
    plain = copy.deepcopy(model)
    for block in plain.blocks:
        make_plain_(block)
    ours, theirs = gradients(model, images()), gradients(plain, images())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() < 0.02 * gradient.norm(), name
    optimizer = build_optimizer(model, TrainConfig(learning_rate=1e-2))
    ThinStep(model, optimizer)
    before = [m.left.clone() for m in layers]
    losses = []
    for _ in range(8):
        loss = model(images()).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    assert not all(torch.equal(m.left, b) for m, b in zip(layers, before, strict=True))
    other = vit()
    rebuild_(other, describe(model))
    other.load_state_dict(model.state_dict(), assign=True)
    assert describe(other) == describe(model)
    model.eval(), other.eval()
    with torch.no_grad():
        assert torch.equal(other(images()), model(images()))
        tt.merge_(other)
        torch.testing.assert_close(other(images()), model(images()), rtol=1e-4, atol=1e-4)
