"""Models by name."""

import pytest
import torch
from safetensors.torch import save_file

from thintune.config import ModelConfig
from thintune.errors import CheckpointError, ConfigError
from thintune.train.models import build_model, classifier_name

SIZES = {"patch_size": 7, "depth": 2, "embed_dim": 48, "num_heads": 3}


def config(**changes):
    return ModelConfig(**{"name": "timm:vit_tiny_patch16_224", "options": SIZES, **changes})


@pytest.mark.parametrize(
    ("changes", "size", "said"),
    [
        ({"name": "timm:vit_tinny_patch16_224"}, 28, "Did you mean 'vit_tiny_patch16_224'"),
        ({"options": {"depht": 2}}, 28, "depht"),
        ({"name": "timm:resnet18", "options": {"depht": 2}}, 28, "depht"),
        ({"options": {"num_heads": 5}}, 28, "could not be built"),
        ({"options": {"num_classes": 5}}, 28, "num_classes"),
        ({"options": {"img_size": 32}}, 28, "img_size is set by data.image_size"),
        ({}, 6, "at least one patch"),
    ],
)
def test_what_timm_cannot_build_is_named(changes, size, said):
    with pytest.raises(ConfigError) as caught:
        build_model(config(**changes), 10, size)
    assert said in str(caught.value)


def test_weights_are_taken_over_but_for_the_head(tmp_path):
    torch.manual_seed(0)
    source = build_model(config(), 7, 28)
    path = tmp_path / "model.safetensors"
    save_file(source.state_dict(), path)
    model = build_model(config(checkpoint=str(path)), 10, 28)
    taken = {n: t for n, t in model.state_dict().items() if not n.startswith("head.")}
    assert len(taken) > 20 and all(torch.equal(t, source.state_dict()[n]) for n, t in taken.items())
    assert classifier_name(model) == "head" and model.head.weight.shape == (10, 48)
    assert not model.head.weight.any() and model.head.weight.requires_grad


def test_weights_of_another_architecture_name_what_differs(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(build_model(config(options={**SIZES, "depth": 3}), 7, 28).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"blocks\.2\..*in the file, missing in the model.*and \d+ more"):
        build_model(config(checkpoint=str(path)), 10, 28)


def test_a_model_without_a_linear_head_is_refused():
    with pytest.raises(ConfigError, match="one linear head"):
        classifier_name(torch.nn.Sequential(torch.nn.Linear(2, 2)))
