import json
import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None)  # a machine that does something else for a second is no failure
settings.register_profile("ci", deadline=None, derandomize=True)  # fresh draws for a developer, the same ones in CI
settings.load_profile("ci" if os.environ.get("CI") else "default")
torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other

TINY = [
    *("--model.name", "timm:vit_tiny_patch16_224"),
    *("--model.options", '{"patch_size": 7, "depth": 2, "embed_dim": 48, "num_heads": 3, "drop_path_rate": 0.2}'),
    *("--data.name", "digits", "--data.image_size", "28", "--data.train_limit", "90", "--data.test_limit", "60"),
    *("--train.batch_size", "20", "--train.epochs", "2", "--train.learning_rate", "1e-4"),
    *("--thin.calibration_images", "40", "--thin.refresh_every", "3", "--thin.activation_rank", "8"),
    *("--galore.rank", "8", "--galore.update_gap", "3", "--galore.scale", "2"),
]


PRETRAINED = [
    *("--model.options", '{"patch_size": 4, "depth": 4}', "--model.checkpoint", "models/vit_demo/model.safetensors"),
    *("--data.train_limit", "300", "--data.test_limit", "100", "--train.batch_size", "60"),
]


@pytest.fixture
def pretrained():
    """Flags that follow those of `tiny` and start from the demo's weights, where accuracies mean something."""
    return list(PRETRAINED)


@pytest.fixture
def tiny():
    """Flags of a run that takes about a second: 5 steps an epoch, the last batch half as large, with random depth."""
    return list(TINY)


@pytest.fixture
def thintune(capsys):
    """Runs the command line in this process; returns exit code, standard output and standard error."""
    from thintune.cli import main

    def run(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def record():
    """Reads the record of a run."""
    return lambda out: json.loads((out / "record.json").read_text())
