"""`thintune convert`: from a file of dense weights to a checkpoint to train and to measure."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import thintune as tt
from thintune.cli.convert import convert_parser
from thintune.config import from_dict
from thintune.io import read_checkpoint
from thintune.measure import peak_rss_bytes
from thintune.nn import SubspaceLinear
from thintune.train import dense
from thintune.train.models import build_model
from thintune.train.prepare import build, load_data

DEMO = [
    *("--model.name", "timm:vit_tiny_patch16_224"),
    *("--model.options", '{"patch_size": 4, "depth": 4, "embed_dim": 48, "num_heads": 3}'),
    *("--data.name", "digits", "--data.image_size", "28", "--data.train_limit", "300", "--data.test_limit", "100"),
    *("--thin.calibration_images", "40"),
]
OPTIONS = {"patch_size": 4, "depth": 4, "embed_dim": 48, "num_heads": 3}


@pytest.fixture
def file(tmp_path):
    """Dense weights of a head of 10 classes, for images of another size."""
    from thintune.config import ModelConfig

    torch.manual_seed(0)
    model = build_model(ModelConfig(name="timm:vit_tiny_patch16_224", options=OPTIONS), 10, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    path = tmp_path / "dense.safetensors"
    save_file(model.state_dict(), path)
    return path


def test_a_checkpoint_is_written_measured_and_trained_on(file, thintune, record, tmp_path):
    out = tmp_path / "thin"
    code, output, err = thintune("convert", *DEMO, "--model.checkpoint", file, "--thin.kept", "0.4", "--out", out)
    assert code == 0 and err == "", err
    assert "16 of 17 linear layers converted (thin)" in output and "head" in output and "excluded by 'head'" in output
    assert f"{out}: thin checkpoint of" in output and "40 calibration images" in output and "not streamed" not in output
    saved = read_checkpoint(out)
    assert len(saved.thin_layers) == 16 and 0.38 < saved.info["kept_weight_fraction"] <= 0.4
    assert torch.equal(saved.stored.load()["head.weight"], dense.TensorFile(file).read("head.weight"))
    code, output, err = thintune("eval", out, "--json")
    assert code == 0, err
    assert json.loads(output)["images"] == 100
    words = [*DEMO, "--model.checkpoint", out, "--train.max_steps", "2", "--train.batch_size", "20"]
    code, _, err = thintune("train", *words, "--out", tmp_path / "run")
    assert code == 0, err
    assert record(tmp_path / "run")["kept_weight_fraction"] == saved.info["kept_weight_fraction"]


@pytest.mark.parametrize("share", [{"kept": 0.4}, {"rank": 9}])
def test_a_streamed_start_of_a_run_is_that_from_the_model_in_memory(share, file):
    document = {
        "model": {"name": "timm:vit_tiny_patch16_224", "options": OPTIONS, "checkpoint": str(file)},
        "data": {"name": "digits", "image_size": 28, "train_limit": 90},
        "thin": {"calibration_images": 40, "attention": "exact", "activation": "exact", **share},
    }
    config = from_dict(document)
    splits = load_data(config.model, config.data)
    streamed, report = build(config, splits)
    model = build_model(config.model, 10, 28)
    expected = tt.convert_(
        model,
        tt.ThinConfig(**{**document["thin"], "exclude_modules": ["head"]}),
        calibration=[splits.train.images(range(32)), splits.train.images(range(32, 40))],
    )
    assert report == expected
    first, second = streamed.state_dict(), model.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert isinstance(streamed.blocks[0].attn.qkv, SubspaceLinear) and not streamed.head.weight.any()


def test_a_file_that_timm_rewrites_is_read_as_a_whole_and_said_so(file, thintune, monkeypatch, tmp_path):
    import timm.models.vision_transformer as module

    def rewrites(state, _model):
        return {name: value.clone() for name, value in state.items()}

    options = ["--data.image_size", "32", "--thin.kept", "0.4"]
    code, output, err = thintune("convert", *DEMO, *options, "--model.checkpoint", file, "--out", tmp_path / "one")
    assert code == 0 and "not streamed" not in output, err
    monkeypatch.setattr(module, "checkpoint_filter_fn", rewrites)
    code, output, err = thintune("convert", *DEMO, *options, "--model.checkpoint", file, "--out", tmp_path / "two")
    assert code == 0 and "not streamed: timm rewrites these weights as a whole" in output, err
    one, two = (read_checkpoint(tmp_path / name).stored.load() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_downloaded_weights_are_converted_in_memory_and_said_so(thintune, monkeypatch, tmp_path):
    import timm

    create = timm.create_model

    def downloads(name, pretrained=False, **options):
        assert pretrained
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", downloads)
    words = ["--model.pretrained", "true", "--thin.rank", "5", "--out", tmp_path / "thin"]
    code, output, err = thintune("convert", *DEMO, *words)
    assert code == 0 and "not streamed: timm downloads these weights as a whole" in output, err
    assert len(read_checkpoint(tmp_path / "thin").thin_layers) == 16


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected dense weights to convert; give model.checkpoint"),
        (["--model.checkpoint", "FOLDER"], "expected a safetensors file of dense weights, got a folder"),
        (["--model.checkpoint", "/nowhere.safetensors"], "found nothing of that name"),
        (["--model.checkpoint", "FILE", "--thin.kept", "2"], "thin.kept: expected a number in (0, 1]"),
        (["--model.checkpoint", "FILE", "--thin.kept", "0.001"], "rank 1 everywhere keeps"),
        (["--model.checkpoint", "FILE", "--micro_batch", "0"], "--micro_batch: expected at least 1"),
        (["--model.checkpoint", "FILE", "--model.options", '{"depth": 2}'], "made for another architecture"),
        (["--model.checkpoint", "FILE", "--train.epochs", "2"], "--train.epochs: unknown flag"),
        (["--model.checkpoint", "FILE", "--model.pretrained", "true"], "expected one of pretrained and checkpoint"),
    ],
)
def test_a_mistake_is_one_line(words, said, file, thintune, tmp_path):
    out = tmp_path / "out"
    words = [{"FOLDER": tmp_path, "FILE": file}.get(word, word) for word in words]
    code, output, err = thintune("convert", *DEMO, *words, "--out", out)
    assert code == 2 and output == "" and err.startswith("thintune: error: ") and err.count("\n") == 1
    assert said in err
    assert not out.exists() or not list(out.iterdir())


def test_an_earlier_checkpoint_is_replaced_only_when_asked(file, thintune, tmp_path):
    words = ["convert", *DEMO, "--model.checkpoint", file, "--out", tmp_path / "out"]
    assert thintune(*words, "--thin.rank", "4")[0] == 0
    code, _, err = thintune(*words, "--thin.rank", "5")
    assert code == 2 and "use --overwrite" in err
    assert thintune(*words, "--thin.rank", "5", "--overwrite")[0] == 0
    assert {spec["rank"] for spec in read_checkpoint(tmp_path / "out").thin_layers.values()} == {5}


def test_every_flag_is_explained(thintune):
    code, output, err = thintune("convert", "--help")
    assert code == 0 and err == "" and "never held as a whole" in output
    silent = [a.option_strings for a in convert_parser()._actions if len(str(a.help or "").split()) < 3]
    assert [flags for flags in silent if flags and flags[-1] not in ("--help", "--model", "--data", "--thin")] == []
    assert "convert" in thintune("--help")[1]


PEAK = """
import sys
from thintune.cli import main
sys.exit(main(sys.argv[1:]))
"""
CODE_BYTES = 52 << 20  # of libraries, touched when their functions first run: any conversion pays it


def test_the_dense_model_is_never_held(tmp_path):
    """177 MB of dense weights, 13 MB of thin ones."""
    if peak_rss_bytes() is None:
        pytest.skip("this system does not tell the memory of a process")
    timm = pytest.importorskip("timm")
    options = {"patch_size": 16, "embed_dim": 512, "depth": 14, "num_heads": 8}
    dense_model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=4, **options)
    path = tmp_path / "dense.safetensors"
    save_file(dense_model.state_dict(), path)
    assert path.stat().st_size > 177e6
    words = ["--model.name", "timm:vit_tiny_patch16_224", "--model.options", json.dumps(options)]
    words += ["--model.checkpoint", str(path), "--data.name", "synthetic", "--data.image_size", "64"]
    words += ["--data.synthetic_images", "64", "--thin.calibration_images", "32", "--thin.rank", "24"]
    words += ["--thin.activation_rank", "4", "--threads", "1", "--out", str(tmp_path / "thin")]
    done = subprocess.run([sys.executable, "-c", PEAK, "convert", *words], capture_output=True, text=True, check=True)
    found = next(line for line in done.stdout.splitlines() if line.startswith("peak memory"))
    thin = read_checkpoint(tmp_path / "thin").size_bytes
    assert 10e6 < thin < 15e6
    layer = 4 * (2048 * 2048 + 3 * 512 * 512 + 512 * 2048) + 3 * 8 * 512 * 512  # moments, weight, decomposition
    block = 32 * 17 * 512 * 4
    assert int(found.split()[2]) * 1e6 < 1.15 * thin + layer + block + CODE_BYTES < 0.6 * path.stat().st_size
