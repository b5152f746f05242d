"""What the methods that convert nothing train, and what autograd keeps for them."""

import pytest
import torch
from torch import nn

from thintune.config import LoraConfig, RunConfig, ThinConfig
from thintune.convert import convert_
from thintune.measure import SavedActivations
from thintune.nn import ThinLinear
from thintune.train.adapters import count_adapters
from thintune.train.methods import finish_, prepare_

B, N, D, C, R = 3, 5, 14, 4, 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(D, 20), nn.Linear(20, 16), nn.Linear(16, C)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).mean(1))


def network(method):
    torch.manual_seed(0)
    model = Net()
    prepare_(model, RunConfig(method=method, lora=LoraConfig(rank=R, alpha=3.0)), "head")
    return model


def inputs():
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(1))


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def kept_shapes(model):
    """Shapes of what autograd keeps of a forward pass, parameters aside."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tuple(tensor.shape))
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # no view of anything larger
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs())
    return sorted(kept)


def test_a_head_alone_keeps_its_own_input_and_nothing_of_the_backbone():
    model = network("head")
    assert trained(model) == {"head.weight", "head.bias"}
    assert kept_shapes(model) == [(B, 16)]
    with SavedActivations(exclude=model) as saved:
        loss = model(inputs()).sum()
    assert saved.bytes == 4 * B * 16
    loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained(model)


def test_frozen_down_projections_keep_their_narrow_output_and_not_the_input():
    model = network("lora_fa")
    ups = {f"{name}.lora_B.default.weight" for name in ("first", "second")}
    assert trained(model) == ups | {"head.weight", "head.bias"}
    relu, projections = (B, N, 20), [(B * N, R)] * 2
    assert kept_shapes(model) == sorted([*projections, relu, (B, 16)])


def test_plain_adapters_keep_the_whole_input_as_well():
    whole, frozen = kept_shapes(network("lora")), kept_shapes(network("lora_fa"))
    elements = [sum(torch.Size(shape).numel() for shape in shapes) for shapes in (whole, frozen)]
    assert elements[0] - elements[1] == B * N * (D + 20)


@pytest.mark.parametrize("method", ["lora", "lora_fa"])
def test_merged_adapters_give_the_trained_map_in_plain_layers(method):
    model = network(method)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    expected = model(inputs())
    finish_(model, RunConfig(method=method))
    assert type(model.first) is nn.Linear and type(model.second) is nn.Linear
    assert (model(inputs()) - expected).abs().max() < 1e-4
    assert (expected - Net()(inputs())).abs().max() > 1e-3


def test_a_dense_model_stays_as_it_is():
    model = network("dense")
    assert trained(model) == {n for n, _ in Net().named_parameters()}


def thin_network():
    torch.manual_seed(0)
    model = Net()
    config = ThinConfig(rank=4, exclude_modules=["head"])
    report = convert_(model, config, method="svd_lora", calibration=[inputs()])
    return model, report


def test_thin_layers_stay_frozen_beside_adapters_that_train_and_merge():
    model, report = thin_network()
    config = RunConfig(method="svd_lora", lora=LoraConfig(rank=R, alpha=3.0))
    with torch.no_grad():
        start = model(inputs())
    prepare_(model, config, "head")
    prepare_(model, config, "head")  # as a resumed run does, whose layers are adapted already
    adapters = {f"{layer}.{part}" for layer in ("first", "second") for part in ("down", "up")}
    assert trained(model) == adapters | {"head.weight", "head.bias"}
    assert (model(inputs()) - start).abs().max() < 1e-6
    counted = count_adapters(report, model)
    # 4 + 2 directions: 6 (14 + 20) of 280 elements, 6 (20 + 16) of 320
    assert [layer.bytes_after for layer in counted.converted] == [4 * 204, 4 * 216]
    assert [layer.rank for layer in counted.converted] == [4, 4]
    for name, parameter in model.named_parameters():
        if name.endswith(".up"):
            nn.init.normal_(parameter)
    expected = model(inputs())
    finish_(model, config)
    assert type(model.first) is ThinLinear and model.first.rank == 4 + R
    assert (model(inputs()) - expected).abs().max() < 1e-4 and (expected - start).abs().max() > 1e-2
