"""Nothing of size O x I is allocated in training, and what is saved is what the formula says."""

import gc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from thintune.linalg import warm_subspace_step_reference
from thintune.measure import SavedActivations
from thintune.nn import CompressedLinear, FactorLinear, SubspaceLinear, TuckerCompressor
from thintune.optim import ThinStep, step

B, N, I, O, K, R = 2, 5, 90, 110, 4, 3  # noqa: E741 - the letters of the equations
RANKS = (2, 3, 3)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation allocated; views of weights that were there before are none."""

    def __init__(self, model):
        super().__init__()
        self.numel = 0
        self._weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._weights:
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def make(kind):
    torch.manual_seed(0)
    if kind == "subspace":
        layer = SubspaceLinear(I, O, K, activation_rank=R)
        layer.start_(torch.linalg.qr(torch.randn(I, R))[0])
    elif kind == "factor":
        layer = FactorLinear(I, O, K)
    elif kind == "tucker":
        layer = FactorLinear(I, O, K, compressor=TuckerCompressor((B, N, I), RANKS))
    elif kind == "compressed":
        return CompressedLinear(I, O, compressor=TuckerCompressor((B, N, I), RANKS))
    else:
        return nn.Linear(I, O)
    layer.set_(torch.linalg.qr(torch.randn(O, K))[0], torch.randn(K, I), torch.zeros(O))
    return layer


def train(layer, optimizer, x):
    layer(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["subspace", "factor", "tucker"])
@pytest.mark.parametrize("kind_of_optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_no_operation_of_a_training_step_returns_anything_of_size_o_times_i(kind, kind_of_optimizer):
    layer = make(kind)
    optimizer = kind_of_optimizer([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
    ThinStep(layer, optimizer, refresh_every=2)
    with Largest(layer) as watch:
        for _ in range(4):
            train(layer, optimizer, torch.randn(B, N, I))
    assert 0 < watch.numel < O * I / 2


@pytest.mark.parametrize("kind", ["dense", "compressed"])
def test_the_watch_sees_a_dense_gradient(kind):
    layer = make(kind)
    with Largest(layer) as watch:
        y = layer(torch.randn(B, N, I))
        assert watch.numel < O * I / 2
        y.square().mean().backward()
    assert watch.numel >= O * I


def test_the_watch_sees_a_fold_that_forms_the_weight(monkeypatch):
    def dense(left, right, *of_step):
        new_left, new_right = warm_subspace_step_reference(left, right, *of_step)
        left.copy_(new_left), right.copy_(new_right)

    monkeypatch.setattr(step, "warm_subspace_step_", dense)
    layer = make("subspace")
    optimizer = torch.optim.SGD([layer.update, layer.bias], lr=1e-3)
    ThinStep(layer, optimizer)
    with Largest(layer) as watch:
        layer(torch.randn(B, N, I)).square().mean().backward()
        assert watch.numel < O * I / 2
        optimizer.step()
    assert watch.numel >= O * I


@pytest.mark.parametrize(
    ("kind", "elements"),
    [
        ("subspace", B * N * R),
        ("factor", B * N * I),
        ("tucker", 2 * 3 * 3 + B * 2 + N * 3 + I * 3),
        ("compressed", 2 * 3 * 3 + B * 2 + N * 3 + I * 3),
        ("dense", B * N * I),
    ],
)
def test_saved_bytes_equal_the_formula(kind, elements):
    layer = make(kind)
    x = torch.randn(B, N, I)
    with SavedActivations(exclude=layer) as saved:
        y = layer(x)
        assert saved.bytes == 4 * elements
    assert y.shape == (B, N, O)


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("subspace", [(B * N, R)]),
        ("factor", [(B, N, I)]),
        ("tucker", [RANKS, (B, 2), (N, 3), (I, 3)]),
        ("compressed", [RANKS, (B, 2), (N, 3), (I, 3)]),
    ],
)
def test_nothing_else_is_saved(kind, shapes):
    layer, saved = make(kind), []
    weights = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    x = torch.randn(B, N, I, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    kept = [t for t in saved if t.untyped_storage().data_ptr() not in weights]
    assert sorted(tuple(t.shape) for t in kept) == sorted(shapes)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in kept)  # no view of anything larger
    assert not any(isinstance(value, torch.Tensor) for value in vars(y.grad_fn).values())


@pytest.mark.parametrize("kind", ["subspace", "factor", "tucker"])
def test_outside_training_a_layer_saves_and_allocates_only_two_products(kind):
    layer = make(kind)
    x = torch.randn(B, N, I)
    with torch.no_grad(), SavedActivations() as saved, Largest(layer) as watch:
        y = layer(x)
    assert saved.bytes == 0 and watch.numel == B * N * O
    assert (y - layer.bias - x @ (layer.left @ layer.right).T).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["subspace", "factor", "tucker"])
def test_nothing_grows_over_fifty_steps(kind):
    layer = make(kind)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
    ThinStep(layer, optimizer, refresh_every=5)

    def live():
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if isinstance(o, torch.Tensor))

    def shapes():
        held = {f"{n}.{k}": v for n, p in layer.named_parameters() for k, v in optimizer.state.get(p, {}).items()}
        return {name: t.shape for name, t in {**layer.state_dict(), **held}.items()}

    counts, kept = [], []
    for i in range(50):
        train(layer, optimizer, torch.randn(B, N, I))
        if i in (9, 49):
            counts.append(live())
            kept.append(shapes())
    assert counts[0] == counts[1]
    assert kept[0] == kept[1]
