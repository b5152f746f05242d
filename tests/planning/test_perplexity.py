from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thintune as tt
from thintune.errors import ConfigError
from thintune.linalg import reconstruct, st_hosvd
from thintune.planning.perplexity import SHARES, Row, perplexity_table, plan_activations, pseudo_label_loss

TOKENS, FEATURES = 7, 12


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 20), nn.Linear(20, 9)
        self.act = nn.ReLU(inplace=True)
        self.unused, self.aside = nn.Linear(9, 9), nn.Linear(FEATURES, 3)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.aside(x)  # called, but nothing comes of it
        return self.head(self.second(self.act(self.first(scale * x))).mean(1))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def batch(net) -> Tensor:
    decay = torch.logspace(0, -2, FEATURES, dtype=torch.float64)
    return torch.randn(10, TOKENS, FEATURES, dtype=torch.float64) * decay + 0.2


def linears(net: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear)}


def test_errors_are_those_of_the_gradients_formed_directly(net, batch):
    table = perplexity_table(net, linears(net), batch)
    seen: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}
    for name, layer in linears(net).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach().clone()))
        layer.register_forward_hook(
            lambda _m, _a, out, name=name: out.register_hook(lambda grad: grads.__setitem__(name, grad)) and None
        )
    net.act = nn.ReLU()  # hooks on a tensor do not go with work in place
    output = net(batch)
    F.cross_entropy(output, output.argmax(-1)).backward()
    for name in ("first", "second", "head"):
        x, g = seen[name].flatten(0, -2), grads[name].flatten(0, -2)
        weight = net.get_submodule(name).weight
        assert (weight.grad - g.T @ x).abs().max() < 1e-12
        for row in table[name]:
            kept = reconstruct(*st_hosvd(seen[name], row.ranks)).flatten(0, -2)
            expected = (weight.grad - g.T @ kept).norm()
            assert row.perplexity == pytest.approx(float(expected), rel=1e-9, abs=1e-14)
            assert row.perplexity > 0 or row.explained_variance == 1


def test_rows_follow_the_shares_down_to_no_error(net, batch):
    table = perplexity_table(net, linears(net), batch, shares=(*SHARES, 1.0))
    for name in ("first", "second", "head"):
        rows = table[name]
        assert [row.explained_variance for row in rows] == [*SHARES, 1.0]
        for less, more in itertools.pairwise(rows):
            assert all(a <= b for a, b in zip(less.ranks, more.ranks, strict=True))
            assert more.saved_bytes >= less.saved_bytes
        assert rows[-1].perplexity < 1e-12 < rows[-2].perplexity
        assert rows[-2].perplexity < rows[0].perplexity or name == "head"  # whose input is nearly one direction


def test_an_error_in_one_mode_never_grows_with_the_share():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 8)).double()
    x = torch.randn(200, 30, dtype=torch.float64) * torch.logspace(0, -2, 30, dtype=torch.float64)
    target = torch.randn(200, 8, dtype=torch.float64)
    shares = [k / 20 for k in range(1, 21)]
    rows = perplexity_table(model, {"0": model[0]}, x, shares=shares, loss=lambda y: (y * target).sum())["0"]
    errors = [row.perplexity for row in rows]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) > 8


def test_bytes_are_those_that_autograd_keeps(net, batch):
    table = perplexity_table(net, linears(net), batch)
    row = table["first"][3]
    layer = nn.Sequential(net.first)
    tt.convert_(layer, method="asi", calibration=[batch], activation_ranks={"0": row.ranks})
    with tt.measure.SavedActivations(exclude=layer) as saved:
        output = layer(batch)
    assert output.requires_grad
    assert saved.bytes == row.saved_bytes


def test_a_layer_that_is_not_reached_is_missing_and_one_without_effect_loses_nothing(net, batch):
    table = perplexity_table(net, linears(net), batch)
    assert set(table) == {"first", "second", "head", "aside"}
    assert {row.perplexity for row in table["aside"]} == {0.0}


def test_the_model_is_left_as_it_was(net, batch):
    net.first.weight.requires_grad_(False)
    net.head.requires_grad_(False)
    net.second.eval()
    flags = {n: p.requires_grad for n, p in net.named_parameters()}
    modes = {n: m.training for n, m in net.named_modules()}
    values = {n: p.clone() for n, p in net.state_dict().items()}
    perplexity_table(net, linears(net), batch)
    with pytest.raises(RuntimeError, match="no loss today"):
        perplexity_table(net, linears(net), batch, loss=_failing)
    assert {n: p.requires_grad for n, p in net.named_parameters()} == flags
    assert {n: m.training for n, m in net.named_modules()} == modes
    assert all(torch.equal(net.state_dict()[n], value) for n, value in values.items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())


def _failing(_: Tensor) -> Tensor:
    raise RuntimeError("no loss today")


def test_a_loss_and_packed_arguments_may_be_given(net, batch):
    layers = {"first": net.first}
    plain = perplexity_table(net, layers, 2 * batch, loss=lambda y: y.square().sum())
    assert perplexity_table(net, layers, (batch, 2.0), loss=lambda y: y.square().sum()) == plain
    assert perplexity_table(net, layers, {"x": batch, "scale": 2.0}, loss=lambda y: y.square().sum()) == plain
    assert perplexity_table(net, layers, 2 * batch) != plain


def test_the_pseudo_label_is_the_most_likely_class():
    output = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    assert float(pseudo_label_loss(output)) == pytest.approx(float(F.cross_entropy(output, torch.tensor([1, 0]))))


def test_no_gradient_is_asked_for_where_they_are_switched_off(net, batch):
    with torch.no_grad():
        table = perplexity_table(net, {"first": net.first}, batch)
    assert table == perplexity_table(net, {"first": net.first}, batch)


def test_a_plan_is_the_best_of_all_within_the_budget(net, batch):
    table = perplexity_table(net, {n: m for n, m in linears(net).items() if n != "aside"}, batch)
    least = sum(min(row.saved_bytes for row in rows) for rows in table.values())
    most = sum(max(row.saved_bytes for row in rows) for rows in table.values())
    plans = list(itertools.product(*table.values()))
    chosen = set()
    for budget in (least, *(least + (most - least) * k // 7 for k in range(1, 7)), most, 10 * most):
        plan = plan_activations(table, budget)
        rows = [_row(table[name], ranks) for name, ranks in plan.items()]
        assert list(plan) == list(table)
        assert sum(row.saved_bytes for row in rows) <= budget
        best = min(sum(r.perplexity for r in p) for p in plans if sum(r.saved_bytes for r in p) <= budget)
        assert math.isclose(sum(row.perplexity for row in rows), best, rel_tol=1e-12)
        chosen.add(tuple(plan.values()))
    assert len(chosen) > 3
    with pytest.raises(ConfigError, match=f"raise the budget to {least} bytes"):
        plan_activations(table, least - 1)


def _row(rows: list[Row], ranks: tuple[int, ...]) -> Row:
    return min((row for row in rows if row.ranks == ranks), key=lambda row: row.perplexity)


@pytest.mark.parametrize("method", ["asi", "wasi"])
def test_a_plan_converts_the_model_and_holds_its_budget(net, batch, method):
    layers = {n: m for n, m in linears(net).items() if n in ("first", "second")}
    table = perplexity_table(net, layers, batch)
    budget = sum(rows[4].saved_bytes for rows in table.values())
    plan = plan_activations(table, budget)
    assert plan != {name: rows[-1].ranks for name, rows in table.items()}
    config = tt.ThinConfig(include_modules=("first", "second"))
    report = tt.convert_(net, config, method=method, calibration=[batch], activation_ranks=plan)
    assert {layer.name: layer.activation_ranks for layer in report.converted} == plan
    kept = 0
    x = batch
    for layer in (net.first, net.second):
        with tt.measure.SavedActivations(exclude=net) as saved:
            y = layer(x)
        kept += saved.bytes
        x = y.detach().relu()
    assert 0 < kept <= budget
