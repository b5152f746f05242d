"""`thintune bench frontier` end to end, on a tiny model, each run in a fresh process."""

import json

import pytest

pytest.importorskip("matplotlib")

TINY = [
    *("--model.name", "timm:vit_tiny_patch16_224"),
    *("--model.options", '{"patch_size": 14, "depth": 1, "embed_dim": 24, "num_heads": 3}'),
    *("--data.name", "digits", "--data.image_size", "28", "--data.train_limit", "40", "--data.test_limit", "20"),
    *("--batch_size", "20", "--epochs", "1", "--threads", "1", "--learning_rates", "[1e-3]"),
]


@pytest.fixture
def bench(thintune, tmp_path):
    return lambda *words: thintune("bench", "frontier", *TINY, "--out", tmp_path / "out", *words)


def test_rows_are_listed_with_their_rates(thintune):
    code, output, err = thintune("bench", "frontier", "--list", "--rows", "dense,wasi-0.[89]")
    assert code == 0 and err == ""
    assert output.splitlines() == [
        f"{name:24} learning rates: 1e-05, 3e-05, 0.0001" for name in ("dense", "wasi-0.8", "wasi-0.9")
    ]


def test_a_frontier_leaves_cells_a_table_and_a_page_and_is_taken_up(bench, tmp_path):
    out = tmp_path / "out"
    code, output, err = bench("--rows", "head", "--seeds", "1")
    assert code == 0, err
    first = json.loads((out / "cells" / "head.lr0.001.seed0.json").read_text())
    assert first["status"] == "completed" and first["record"]["test_accuracy"] is None
    assert first["test"]["images"] == 20 and not (out / "runs" / "head.lr0.001.seed0").exists()
    code, output, err = bench("--rows", "head,thin-0.6", "--seeds", "1")
    assert code == 0, err
    assert "head" in output and "thin-0.6: at no more memory" in output and "2/2 thin-0.6" in err
    again = json.loads((out / "cells" / "head.lr0.001.seed0.json").read_text())
    assert again == first
    thin = json.loads((out / "cells" / "thin-0.6.lr0.001.seed0.json").read_text())
    assert thin["subspaces"]["epochs"] == [0, 1] and thin["record"]["config"]["train"]["evaluate_test"] is False
    document = json.loads((out / "frontier.json").read_text())
    assert [row["name"] for row in document["rows"]] == ["head", "thin-0.6"]
    assert len((out / "frontier.csv").read_text().splitlines()) == 3
    assert (out / "report.html").read_text().count("<svg") == 4
    assert bench("--rows", "head", "--seeds", "1")[0] == 0  # nothing to run; rows of other calls stay in the report
    document = json.loads((out / "frontier.json").read_text())
    assert [row["name"] for row in document["rows"]] == ["head", "thin-0.6"]
    code, _, err = bench("--rows", "head", "--epochs", "2")
    assert code == 2 and "holds a bench of other settings: epochs is 1, not 2" in err


def test_a_run_that_fails_is_named_and_run_again(bench, tmp_path):
    code, _, err = bench("--rows", "galore-r64", "--seeds", "1")
    assert code == 2 and "thintune: error: galore-r64:" in err and "galore.rank" in err
    assert json.loads((tmp_path / "out" / "cells" / "galore-r64.lr0.001.seed0.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "thinn"], "no row is named 'thinn'"),
        (["--preset", "papr"], "Did you mean 'paper'"),
        (["--seeds", "0"], "seeds: expected at least 1, got 0"),
        (["--seed", "1"], "--seed: unknown flag"),
        (["--data.name", "digitz"], "Did you mean 'digits'"),
    ],
)
def test_mistakes_are_named(bench, words, said):
    code, _, err = bench(*words)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1
