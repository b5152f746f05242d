"""Conversion from a source of weights, block by block, against conversion of the model in memory."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import thintune as tt
from thintune.convert import walk, weights
from thintune.convert.calibration import Moments
from thintune.convert.walk import Walk, chains
from thintune.convert.weights import DenseLayers
from thintune.errors import ConversionError
from thintune.nn import SubspaceLinear


class Source:
    """Tensors of a model in memory; remembers what it handed out."""

    def __init__(self, model):
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.names = list(self.state)
        self.given = []
        self.loads = []

    def load(self, name):
        found = self.state[name].clone()
        self.loads.append(name)
        if name.endswith(("fc1.weight", "fc2.weight")):
            self.given.append(StorageWeakRef(found.untyped_storage()))
        return found

    def alive(self):
        return sum(not storage.expired() for storage in self.given)


def skeleton(model):
    return copy.deepcopy(model).to("meta")


def assert_same(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert not any(tensor.is_meta for tensor in second.values())
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert [p.requires_grad for p in one.parameters()] == [p.requires_grad for p in other.parameters()]


class Residual(nn.Module):
    """No chain: the sum stands between two blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(24, 24)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24)) for _ in range(3)
        )
        self.unused = nn.Linear(24, 24)
        self.head = nn.Linear(24, 5)
        self.double()

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Stages(nn.Module):
    """A chain whose blocks change the shape, between a stem and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(24, 24)
        self.stages = nn.Sequential(
            nn.Sequential(nn.Linear(24, 16), nn.Tanh()), nn.Sequential(nn.Linear(16, 30), nn.Tanh()), nn.Linear(30, 8)
        )
        self.head = nn.Linear(8, 5)
        self.double()

    def forward(self, x):
        return self.head(self.stages(self.stem(x)))


CONFIGS = [
    tt.ThinConfig(kept=0.5, activation_rank=6),
    tt.ThinConfig(explained_variance=0.9, activation_rank=6),
    tt.ThinConfig(rank=4, activation_rank=6),
]


@pytest.mark.parametrize("resident", [weights._RESIDENT_BYTES, 1])
@pytest.mark.parametrize("config", CONFIGS, ids=["kept", "explained", "rank"])
@pytest.mark.parametrize("kind", ["net", "residual", "stages"])
def test_a_streamed_conversion_is_that_of_the_model_in_memory(kind, config, resident, make, inputs, monkeypatch):
    monkeypatch.setattr(weights, "_RESIDENT_BYTES", resident)
    model = {"net": lambda: make(depth=3), "residual": Residual, "stages": Stages}[kind]()
    batches = [inputs(40), inputs(25)]
    empty, source = skeleton(model), Source(model)
    expected = tt.convert_(model, config, calibration=batches)
    found = tt.convert_(empty, config, calibration=batches, source=source)
    assert found == expected
    assert_same(model, empty)


ALL = {"rank_allocation": "sensitivity", "output_weighting": "gradient", "reconstruction_steps": 4}


@pytest.mark.parametrize("resident", [weights._RESIDENT_BYTES, 1])
@pytest.mark.parametrize("kind", ["blocks", "stages"])
def test_with_all_that_looks_at_the_dense_model_too(kind, resident, make, inputs, monkeypatch):
    monkeypatch.setattr(weights, "_RESIDENT_BYTES", resident)
    config = tt.ThinConfig(kept=0.5, activation_rank=6, include_modules=[kind], **ALL)
    model = make(depth=3) if kind == "blocks" else Stages()
    batches = [inputs(40), inputs(25)]
    empty, source = skeleton(model), Source(model)
    expected = tt.convert_(model, config, calibration=batches)
    assert tt.convert_(empty, config, calibration=batches, source=source) == expected
    assert_same(model, empty)


def test_worths_and_reconstruction_hold_one_block_of_dense_weights(make, inputs, monkeypatch):
    net = make(depth=5)
    empty, source, seen = skeleton(net), Source(net), []
    for block in empty.blocks:
        block.norm.register_forward_hook(lambda *_: seen.append(source.alive()))
        block.register_forward_hook(lambda *_: seen.append(source.alive()))
    monkeypatch.setattr(weights, "_RESIDENT_BYTES", 3 * 24 * 40 * 8)
    tt.convert_(
        empty, tt.ThinConfig(kept=0.5, exclude_modules=["head"], **ALL), calibration=[inputs(40)], source=source
    )
    assert max(seen) == 2 and source.alive() == 0


@pytest.mark.parametrize("config", CONFIGS, ids=["kept", "explained", "rank"])
def test_a_chain_gives_what_passes_of_the_whole_model_give(config, make, inputs, monkeypatch):
    for build in (lambda: make(depth=3), Stages):
        model = build()
        other, batches = copy.deepcopy(model), [inputs(40), inputs(25)]
        kept = [batch.clone() for batch in batches]
        tt.convert_(model, config, calibration=batches)
        with monkeypatch.context() as patch:
            patch.setattr(walk, "chains", lambda *_: {})
            tt.convert_(other, config, calibration=batches)
        assert_same(model, other)
        assert all(torch.equal(one, two) for one, two in zip(kept, batches, strict=True))


def test_in_a_chain_every_block_runs_a_few_times_and_the_model_only_up_to_it(make, inputs):
    net, calls = make(depth=6), [0] * 6
    for index, block in enumerate(net.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    tt.convert_(net, tt.ThinConfig(kept=0.5, exclude_modules=["head"]), calibration=[inputs(30), inputs(30)])
    assert calls[0] == 1 + 2 * (2 + 2 + 2)  # the probe; two sweeps over two batches: entered, observed, moved on
    assert set(calls[1:5]) == {1 + 2 * (2 + 2)} and calls[5] == 1 + 2 * 2


def test_no_more_than_one_block_of_dense_weights_is_held(make, inputs):
    net = make(depth=5)
    empty, source, seen = skeleton(net), Source(net), []
    empty_moments = Moments.empty.__func__

    def watched(cls, features, like):
        seen.append(source.alive())
        return empty_moments(cls, features, like)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Moments, "empty", classmethod(watched))
        patch.setattr(weights, "_RESIDENT_BYTES", 3 * 24 * 40 * 8)
        config = tt.ThinConfig(kept=0.5, exclude_modules=["head"])
        tt.convert_(empty, config, calibration=[inputs(40)], source=source)
    assert len(seen) == 20 and max(seen) == 2
    assert source.alive() == 0
    assert all(isinstance(block.fc1, SubspaceLinear) for block in empty.blocks)
    assert source.loads.count("head.weight") == 1


def test_one_dense_weight_at_a_time_where_even_a_block_is_too_much(make, inputs, monkeypatch):
    net = make(depth=3)
    empty, source, seen = skeleton(net), Source(net), []
    for block in empty.blocks:
        block.fc1.register_forward_hook(lambda *_: seen.append(source.alive()))
        block.fc2.register_forward_pre_hook(lambda *_: seen.append(source.alive()))
    monkeypatch.setattr(weights, "_RESIDENT_BYTES", 1)
    tt.convert_(empty, tt.ThinConfig(kept=0.5), calibration=[inputs(40)], source=source)
    assert max(seen) == 1 and source.alive() == 0


def test_what_is_not_converted_is_read_as_it_is(inputs):
    model = Residual()
    empty, source = skeleton(model), Source(model)
    config = tt.ThinConfig(rank=3, include_modules=["blocks.1", "unused"])
    report = tt.convert_(empty, config, calibration=[inputs(30)], source=source)
    assert [layer.name for layer in report.converted] == ["blocks.1.1", "blocks.1.3"]
    assert torch.equal(empty.unused.weight, model.unused.weight)
    assert torch.equal(empty.blocks[0][1].weight, model.blocks[0][1].weight)
    assert not any(tensor.is_meta for tensor in empty.state_dict().values())


def test_what_no_source_holds_is_named(make, inputs):
    net = make()
    with pytest.raises(ConversionError, match=r"no values for .*blocks\.0.*and 11 more"):
        tt.convert_(skeleton(net), tt.ThinConfig(rank=2), calibration=[inputs(9)])
    source = Source(net)
    source.names.remove("blocks.1.norm.bias")
    with pytest.raises(ConversionError, match=r"no values for blocks\.1\.norm\.bias;"):
        tt.convert_(skeleton(net), tt.ThinConfig(rank=2), calibration=[inputs(9)], source=source)
    for method in ("wsi", "wasi", "asi"):
        with pytest.raises(ConversionError, match="only method thin"):
            tt.convert_(skeleton(net), method=method, calibration=[inputs(3, 9)], source=source)


# What is a chain.


class Blocks(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(24, 24).double() for _ in range(3))
        self.run = forward

    def forward(self, x):
        return self.run(self.blocks, x)


def in_order(blocks, x):
    for block in blocks:
        x = block(x)
    return x


def backwards(blocks, x):
    return in_order(list(blocks)[::-1], x)


def twice(blocks, x):
    return in_order(blocks, in_order(blocks, x))


def not_all(blocks, x):
    return in_order(list(blocks)[:2], x)


def between(blocks, x):
    for block in blocks:
        x = block(x) * 2
    return x


def between_in_place(blocks, x):
    for block in blocks:
        x = block(x)
        x += 1
    return x


def around(blocks, x):
    for block in blocks:
        x = x + block(x)
    return x


@pytest.mark.parametrize(
    ("forward", "is_chain"),
    [
        (in_order, True),
        (lambda blocks, x: F.relu(in_order(blocks, x + 1)), True),
        (backwards, False),
        (twice, False),
        (not_all, False),
        (between, False),
        (between_in_place, False),
        (around, False),
    ],
)
def test_a_chain_passes_each_output_on_as_it_is(forward, is_chain, inputs):
    model, x = Blocks(forward), inputs(30)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = chains(model, DenseLayers(model, layers, None), x)
    assert found == ({"blocks": ["blocks.0", "blocks.1", "blocks.2"]} if is_chain else {})
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    walked = Walk(model, DenseLayers(model, layers, None), [x]).moments(list(layers))
    assert [seen.count for _, seen in walked] == [30] * (2 if forward is not_all else 3)


class Masked(nn.Module):
    """Blocks that take a second argument, the same for all of them or not."""

    class Block(nn.Module):
        def __init__(self, writes):
            super().__init__()
            self.fc, self.writes = nn.Linear(24, 24), writes

        def forward(self, x, mask=None):
            x = x.mul_(1.0) if self.writes else x
            return self.fc(x if mask is None else x * mask)

    def __init__(self, same=True, writes=False):
        super().__init__()
        self.blocks = nn.ModuleList(Masked.Block(writes) for _ in range(3))
        self.same = same
        self.double()

    def forward(self, x):
        x, mask = x * 1.0, torch.ones(24, dtype=x.dtype)
        for index, block in enumerate(self.blocks):
            x = block(x, mask=mask if self.same else mask * index)
        return x


@pytest.mark.parametrize(
    ("same", "writes", "is_chain"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_further_arguments_must_be_the_same_and_inputs_stay_as_they_are(same, writes, is_chain, inputs):
    model = Masked(same, writes)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert bool(chains(model, DenseLayers(model, layers, None), inputs(5))) == is_chain
    other, batch = copy.deepcopy(model), inputs(30)
    empty = skeleton(model)
    tt.convert_(other, tt.ThinConfig(kept=0.5), calibration=[batch])
    tt.convert_(empty, tt.ThinConfig(kept=0.5), calibration=[batch], source=Source(model))
    assert_same(other, empty)
