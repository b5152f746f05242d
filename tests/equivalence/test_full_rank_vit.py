"""At full rank a thin vision transformer is the dense one: outputs and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thintune as tt
from thintune.nn import CompressedLinear, FactorLinear, SubspaceLinear, ThinLinear

timm = pytest.importorskip("timm")

FULL = 48
ALL = tt.ThinConfig(
    norm="exact", rank=FULL, activation_rank=10_000, activation_explained_variance=1.0, exclude_modules=("head",)
)
THIN = tt.ThinConfig(
    norm="exact", rank=9, activation_rank=7, activation_explained_variance=0.6, exclude_modules=("head",)
)
METHODS = ["thin", "wsi", "wasi", "asi", "amc"]


def vit() -> nn.Module:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=28, num_classes=5, patch_size=7, depth=2, embed_dim=FULL, num_heads=3
    ).double()
    for parameter in model.parameters():  # biases, norms and tokens away from their zeros and ones
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture
def dense() -> nn.Module:
    return vit()


def images(seed: int, count: int = 4) -> Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def backward(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    F.cross_entropy(output, torch.arange(len(x)) % 5).backward()
    return output.detach()


def dense_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients under the names of the dense model; those of a factor pair under `.left` and `.right`."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        layer = model.get_submodule(owner)
        if parameter.grad is None:
            assert isinstance(layer, SubspaceLinear) and leaf in ("left", "right"), name
        elif isinstance(layer, SubspaceLinear) and leaf == "update":
            found[f"{owner}.weight"] = parameter.grad @ layer.basis.T
        else:
            found[name] = parameter.grad
    return found


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_gives_the_dense_outputs_and_every_dense_gradient(dense, method):
    thin = copy.deepcopy(dense)
    report = tt.convert_(thin, ALL, method=method, calibration=[images(1)])
    assert len(report.converted) == 8

    x = images(2)  # not those of the calibration
    assert (backward(thin, x) - backward(dense, x)).abs().max() < 1e-9
    expected = {n: p.grad for n, p in dense.named_parameters()}
    found = dense_gradients(thin)
    for name, layer in thin.named_modules():
        if isinstance(layer, FactorLinear):
            grad = expected.pop(f"{name}.weight")
            expected |= {f"{name}.left": grad @ layer.right.T, f"{name}.right": layer.left.T @ grad}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.abs().max() > 1e-6, f"{name}: nothing to compare"
        assert (found[name] - grad).abs().max() < 1e-9, name


def test_a_lower_rank_is_not_the_dense_model(dense):
    thin = copy.deepcopy(dense)
    tt.convert_(thin, THIN, calibration=[images(1)])
    assert (thin(images(2)) - dense(images(2))).abs().max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("through", ["timm", "torch"])
def test_gradient_checkpointing_changes_no_gradient(dense, method, through):
    tt.convert_(dense, THIN, method=method, calibration=[images(1)])
    plain, recomputed = dense, copy.deepcopy(dense)
    x, calls = images(2), [0]
    recomputed.blocks[0].register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    if through == "timm":
        recomputed.set_grad_checkpointing(True)
    else:
        for block in recomputed.blocks:
            inner = block.forward
            block.forward = lambda y, inner=inner: torch.utils.checkpoint.checkpoint(inner, y, use_reentrant=False)
    with tt.measure.SavedActivations(exclude=plain) as whole:
        expected = backward(plain, x)
    with tt.measure.SavedActivations(exclude=recomputed) as fewer:
        assert torch.equal(backward(recomputed, x), expected)
    assert fewer.bytes < whole.bytes
    assert through == "torch" or calls[0] == 2
    for (name, ours), (_, theirs) in zip(plain.named_parameters(), recomputed.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or (ours.grad - theirs.grad).abs().max() < 1e-14, name


@pytest.mark.parametrize("method", METHODS)
def test_the_model_stays_a_timm_model(dense, method):
    kind = type(dense)
    tt.convert_(dense, THIN, method=method, calibration=[images(1)])
    assert type(dense) is kind
    features = dense.forward_features(images(2))
    assert features.shape == (4, 17, FULL)
    assert torch.equal(dense.forward_head(features), dense(images(2)))
    assert dense.get_classifier() is dense.head
    dense.reset_classifier(3)
    assert dense(images(2)).shape == (4, 3)


@pytest.mark.parametrize("method", METHODS)
def test_inference_meets_no_autograd_function(dense, method, monkeypatch):
    tt.convert_(dense, THIN, method=method, calibration=[images(1)])
    dense.eval()
    trained = dense(images(2))

    def refuse(*_args, **_kwargs):
        raise AssertionError("an autograd function ran")

    for name in ("subspace_linear", "factor_linear", "compressed_linear", "attention_branch", "mlp_branch"):
        monkeypatch.setattr(f"thintune.ops.{name}", refuse)
    with pytest.raises(AssertionError, match="an autograd function ran"):
        dense(images(2))  # the guard works
    with torch.no_grad():
        assert (dense(images(2)) - trained).abs().max() < 1e-12


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_thin_model_can_be_exported(dense):
    tt.convert_(dense, THIN, calibration=[images(1)])
    dense.eval()
    with torch.no_grad():
        program = torch.export.export(dense, (images(2),))
        assert (program.module()(images(3)) - dense(images(3))).abs().max() < 1e-12
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("autograd" in target or "Subspace" in target for target in targets)
    assert not any(name.endswith(("update", "basis")) for name in _used(program))


def _used(program) -> set[str]:
    """Names of the parameters and buffers that the graph reads."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {names[node.name] for node in program.graph.nodes if node.name in names and node.users}


def test_a_merged_thin_model_has_the_thin_outputs_and_the_dense_names(dense):
    names = list(dense.state_dict())
    tt.convert_(dense, THIN, calibration=[images(1)])
    dense.eval()
    with torch.no_grad():
        expected = dense(images(2))
        tt.merge_(dense)
        assert (dense(images(2)) - expected).abs().max() < 1e-12
    assert list(dense.state_dict()) == names
    assert not any(isinstance(m, ThinLinear | CompressedLinear) for m in dense.modules())


@pytest.mark.parametrize(
    ("pattern", "rank", "axes"),
    [("layers.0.*.fc?", 12, 3), ("layers.1.downsample.reduction", 24, 4)],
)
@pytest.mark.parametrize("method", ["thin", "asi"])
def test_a_swin_transformer_trains_through_windows_and_images(method, pattern, rank, axes):
    torch.manual_seed(0)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=28,
        num_classes=5,
        embed_dim=12,
        depths=(2, 1),
        num_heads=(2, 3),
        drop_path_rate=0.0,
    ).double()
    dense = copy.deepcopy(swin)
    config = tt.ThinConfig(
        norm="exact", rank=rank, activation_rank=10_000, activation_explained_variance=1.0, include_modules=(pattern,)
    )
    report = tt.convert_(swin, config, method=method, calibration=[images(1)])
    seen: set[int] = set()
    for layer in report.converted:
        swin.get_submodule(layer.name).register_forward_pre_hook(lambda _, args: seen.add(args[0].ndim))
    x = images(2)
    assert (backward(swin, x) - backward(dense, x)).abs().max() < 1e-9
    found, expected = dense_gradients(swin), {n: p.grad for n, p in dense.named_parameters()}
    assert found.keys() == expected.keys()
    assert all((found[name] - grad).abs().max() < 1e-9 for name, grad in expected.items())
    assert seen == {axes}
