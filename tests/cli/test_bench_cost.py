"""`thintune bench cost` end to end, on a tiny model, each row in a fresh process."""

import json

import pytest

from thintune.bench.limits import why_not_permitted

TINY = [
    *("--model.name", "timm:vit_tiny_patch16_224"),
    *("--model.options", '{"patch_size": 8, "depth": 1, "embed_dim": 48, "num_heads": 3}'),
    *("--image_size", "16", "--classes", "3", "--batch_size", "6", "--threads", "1", "--repeats", "1"),
]


@pytest.fixture
def bench(thintune, tmp_path):
    return lambda *words: thintune("bench", "cost", *TINY, "--out", tmp_path / "out", *words)


def cells(folder):
    return {path.name: json.loads(path.read_text()) for path in (folder / "out" / "cells").iterdir()}


def test_rows_are_listed_without_running(thintune):
    code, output, err = thintune("bench", "cost", "--list", "--rows", "dense-mb1*,wasi-mb1")
    assert code == 0 and err == ""
    assert [line.split()[0] for line in output.splitlines()] == [
        *("dense-mb16", "dense-mb16-ckpt", "dense-mb16-in-backward", "dense-mb16-in-backward-ckpt"),
        *("dense-mb16-in-momentum", "dense-mb16-in-momentum-ckpt", "dense-mb1", "dense-mb1-ckpt"),
        *("dense-mb1-in-backward", "dense-mb1-in-backward-ckpt", "dense-mb1-in-momentum"),
        *("dense-mb1-in-momentum-ckpt", "wasi-mb1"),
    ]


def test_a_bench_leaves_cells_and_a_table_and_is_taken_up_where_it_stopped(bench, tmp_path):
    code, output, err = bench("--rows", "dense-mb4,thin-0.4-mb4")
    assert code == 0, err
    assert "dense-mb4" in output and "thin-0.4-mb4" in output and "2/2" in err
    found = cells(tmp_path)
    assert set(found) == {"dense-mb4.0.json", "thin-0.4-mb4.0.json"}
    for cell in found.values():
        assert cell["status"] == "finished" and cell["error"] is None and cell["threads"] == 1
        assert cell["predicted_peak_bytes"] > 0 and cell["limit"] is None
        assert cell["peak_above_baseline_bytes"] > 0 and cell["baseline_rss_bytes"] > 0
        assert len(cell["s_per_image"]) == 1 and set(cell["inference_images_per_s"]) == {"1", "16"}
        assert cell["checkpoint_bytes"] > 0 and {"torch", "timm", "python"} <= cell["versions"].keys()
        assert {"command", "date", "git_commit", "settings"} <= cell.keys()
    thin = found["thin-0.4-mb4.0.json"]["paper"]
    assert thin["flops_ratio_to_dense"] != 1 and thin["images"] == 4
    assert found["dense-mb4.0.json"]["paper"]["flops_ratio_to_dense"] == 1
    document = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["row"]["name"] for row in document["rows"]] == ["dense-mb4", "thin-0.4-mb4"]
    assert "| thin-0.4-mb4 | finished |" in (tmp_path / "out" / "table.md").read_text()

    dates = {name: cell["date"] for name, cell in found.items()}
    code, output, err = bench("--rows", "dense-mb4,thin-0.4-mb4")
    assert code == 0 and "1/2" not in err and "thin-0.4-mb4" in output
    assert {name: cell["date"] for name, cell in cells(tmp_path).items()} == dates
    code, _, err = bench("--rows", "dense-mb4", "--steps", "2")
    assert code == 2 and "holds a bench of other settings: steps is 1, not 2" in err


def test_a_row_that_fails_is_named_and_run_again(bench, tmp_path, monkeypatch):
    folder = tmp_path / "away"
    folder.mkdir()
    (folder / "pytorch_optimizer.py").write_text("raise ImportError('not here')")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        code, _, err = bench("--rows", "galore-mb1")
    assert code == 2 and "pip install 'thintune[bench]'" in err
    assert cells(tmp_path)["galore-mb1.0.json"]["status"] == "failed"
    pytest.importorskip("pytorch_optimizer")
    assert bench("--rows", "galore-mb1")[0] == 0


@pytest.mark.skipif(why_not_permitted() is not None, reason="no control group can be made here")
def test_a_limit_kills_what_needs_more(bench, tmp_path):
    code, output, err = bench("--rows", "dense-mb4", "--limit", "40MB")
    assert code == 0 and "killed" in output, err
    cell = cells(tmp_path)["dense-mb4.0.json"]
    assert cell["status"] == "killed" and cell["limit"]["limit_bytes"] == 40_000_000
    assert "peak_above_baseline_bytes" not in cell


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["speed"], "unknown bench, expected cost"),
        (["cost"], "--out: expected a folder"),
        (["cost", "--out", "OUT", "--step", "3"], "--step: unknown flag. Did you mean '--steps'"),
        (["cost", "--out", "OUT", "--rows", "dens-full"], "Did you mean 'dense-full'"),
        (["cost", "--out", "OUT", "--limit", "lots"], "limit: expected bytes"),
        (["cost", "--out", "OUT", "--batch_size", "0"], "batch_size: expected at least 1"),
    ],
)
def test_mistakes_are_one_line(thintune, words, said, tmp_path):
    code, _, err = thintune("bench", *(str(tmp_path / "out") if word == "OUT" else word for word in words))
    assert code == 2 and said in err and "Traceback" not in err
    assert len(err.splitlines()) == 1
