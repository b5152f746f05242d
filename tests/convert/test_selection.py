from __future__ import annotations

import pytest
import torch
from torch import nn

import thintune as tt
from thintune.convert.selection import replace_, select
from thintune.errors import ConversionError
from thintune.nn import SubspaceLinear

LINEARS = ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2", "head"]


def chosen(model, **patterns) -> list[str]:
    return list(select(model, tt.ThinConfig(**patterns))[0])


def test_everything_is_chosen_in_the_models_order_without_patterns(net):
    assert chosen(net) == LINEARS


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("head", ["head"]),
        ("blocks.1", ["blocks.1.fc1", "blocks.1.fc2"]),
        ("*.fc2", ["blocks.0.fc2", "blocks.1.fc2"]),
        ("blocks.[!0].fc?", ["blocks.1.fc1", "blocks.1.fc2"]),
    ],
)
def test_a_pattern_is_a_name_a_prefix_or_a_shell_pattern(net, pattern, expected):
    assert chosen(net, include_modules=[pattern]) == expected
    assert chosen(net, exclude_modules=[pattern]) == [n for n in LINEARS if n not in expected]


def test_a_prefix_ends_at_a_dot(make):
    net = make(depth=11)
    assert chosen(net, include_modules=["blocks.1"]) == ["blocks.1.fc1", "blocks.1.fc2"]  # and not blocks.10


def test_exclusion_wins_over_inclusion_and_both_give_their_reason(net):
    config = tt.ThinConfig(include_modules=["blocks"], exclude_modules=["*.fc1"])
    layers, skipped = select(net, config)
    assert list(layers) == ["blocks.0.fc2", "blocks.1.fc2"]
    assert skipped == {
        "blocks.0.fc1": "excluded by '*.fc1'",
        "blocks.1.fc1": "excluded by '*.fc1'",
        "head": "not in include_modules",
    }


def test_unknown_patterns_are_all_named_with_the_nearest_name(net):
    with pytest.raises(ConversionError) as error:
        select(net, tt.ThinConfig(include_modules=["block.0"], exclude_modules=["heads"]))
    text = str(error.value)
    assert "'block.0' matches no linear layer. Did you mean 'blocks.0'?" in text
    assert "'heads' matches no linear layer. Did you mean 'head'?" in text


def test_nothing_left_to_convert_is_an_error(net):
    with pytest.raises(ConversionError, match=r"no linear layer matched: 5 in the model.*loosen the patterns"):
        select(net, tt.ThinConfig(exclude_modules=["*"]))
    with pytest.raises(ConversionError, match="no linear layer matched: 0 in the model"):
        select(nn.Sequential(nn.Conv2d(3, 3, 1)), tt.ThinConfig())


def test_subclasses_of_linear_are_left_to_their_owner():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 6)})
    layers, skipped = select(model, tt.ThinConfig())
    assert list(layers) == ["fc"]
    assert "NonDynamicallyQuantizableLinear" in skipped["attention.out_proj"]


def test_layers_that_share_a_weight_are_left_dense():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 7))
    model[1].weight = model[0].weight
    layers, skipped = select(model, tt.ThinConfig())
    assert list(layers) == ["2"]
    assert skipped == {"0": "shares its weight with 1", "1": "shares its weight with 0"}


def test_a_layer_tied_to_an_embedding_is_left_dense():
    model = nn.ModuleDict({"tokens": nn.Embedding(9, 6), "fc": nn.Linear(6, 6), "out": nn.Linear(6, 9)})
    model["out"].weight = model["tokens"].weight
    assert select(model, tt.ThinConfig())[1] == {"out": "shares its weight with tokens"}


def test_a_module_used_under_two_names_is_replaced_under_both(inputs):
    fc = nn.Linear(24, 24).double()
    model = nn.Sequential(fc, nn.Tanh(), fc, nn.Linear(24, 5).double())
    report = tt.convert_(model, tt.ThinConfig(rank=4), calibration=[inputs(9)])
    assert model[0] is model[2]
    assert isinstance(model[0], SubspaceLinear)
    assert [layer.skipped for layer in report.layers] == [None, "is the same module as 0", None]


def test_replacing_keeps_the_mode_and_reaches_every_parent():
    old = nn.Linear(3, 3).eval()
    model = nn.ModuleDict({"a": nn.Sequential(old), "b": nn.ModuleDict({"x": old, "y": old})})
    new = nn.Linear(3, 3)
    replace_(model, old, new)
    assert model["a"][0] is model["b"]["x"] is model["b"]["y"] is new
    assert not new.training


def test_a_model_that_is_thin_already_is_refused(net, inputs):
    tt.convert_(net, tt.ThinConfig(rank=3), calibration=[inputs(9)])
    with pytest.raises(ConversionError, match="merge_ it first"):
        tt.convert_(net, tt.ThinConfig(rank=3), calibration=[inputs(9)])


def test_a_model_with_compressed_inputs_is_refused(net, inputs):
    tt.convert_(net, method="asi", calibration=[inputs(9, 4)])
    with pytest.raises(ConversionError, match="merge_ it first"):
        tt.convert_(net, method="asi", calibration=[inputs(9, 4)])


def test_a_bare_linear_layer_is_refused():
    layer = nn.Linear(4, 3)
    with pytest.raises(ConversionError, match="wrap it"):
        tt.convert_(layer, tt.ThinConfig(rank=2), calibration=[torch.randn(5, 4)])
