"""From cells to the table, the verdicts and the page."""

import pytest

from thintune.bench.frontier.report import table_cells, to_html, to_markdown, verdicts
from thintune.bench.frontier.rows import all_rows
from thintune.bench.frontier.settings import FrontierSettings
from thintune.bench.frontier.table import frontier_table, to_csv

ROWS = {row.name: row for row in all_rows()}
SETTINGS = FrontierSettings(seeds=2, learning_rates=(1e-4,))
SUBSPACES = {
    "explained_variances": [0.5, 0.8, 0.9, 0.99],
    "epochs": [0, 1],
    "layers": {
        f"blocks.{n}.attn.qkv": {
            "weight": {
                "rank": 8,
                "features": 12,
                "explained_ranks": [[1, 3, 4, 7], [1, 3, 5, 7]],
                "mean_angle_from_start_deg": [0, 5],
                "mean_angle_from_last_deg": [0, 5],
            },
            "input": {"rank": 4, "mean_angle_from_start_deg": [0, 50], "mean_angle_from_last_deg": [0, 50]},
        }
        for n in range(2)
    },
}


def cell(name, seed, accuracy, peak, seconds, **more):
    record = {
        "val_accuracy": accuracy,
        "peak_above_baseline_bytes": peak,
        "train_peak_above_baseline_bytes": peak,
        "step_time_s_median": seconds,
        "train_flops_per_step": 10**9,
        "saved_activation_bytes": 10**6,
        "kept_weight_fraction": 0.4,
        "parameter_bytes": 10,
        "checkpoint_bytes": 10,
        "prepare_time_s": 1.0,
        "steps": 3,
        "threads": 1,
        "date": "today",
        "git_commit": None,
        "versions": {"torch": "2"},
    }
    return {
        "status": "completed",
        "error": None,
        "row": {"name": name, "method": ROWS[name].method},
        "seed": seed,
        "learning_rate": 1e-4,
        "record": record,
        "test": {"accuracy": accuracy, "images_per_s": 9.0},
        "subspaces": None,
        **more,
    }


def table(**found):
    """Accuracy of two seeds, peak and step time by row."""
    cells = {}
    for word, (accuracies, peak, seconds) in found.items():
        name = word.replace("_0", "-0.").replace("lora", "lora-r16")
        cells[name] = {(1e-4, seed): cell(name, seed, a, peak, seconds) for seed, a in enumerate(accuracies)}
    document = frontier_table([ROWS[name] for name in cells], cells, SETTINGS)
    return {**document, "command": "bench <it>", "date": "today", "git_commit": None}


def test_accuracy_is_mean_and_deviation_over_seeds_and_costs_are_medians():
    row = table(thin_04=((0.8, 0.9), 2e6, 0.5))["rows"][0]
    assert row["test_accuracy"]["mean"] == pytest.approx(0.85) and row["test_accuracy"]["std"] == pytest.approx(
        0.0707, abs=1e-4
    )
    assert row["step_time_s_median"] == 0.5 and row["ours"] and row["tested"] == 2
    assert table_cells(row)[:6] == ["thin-0.4", "0.0001", "85.00 ± 7.07", "2", "2", "0.500"]


def test_a_row_is_beaten_by_whoever_is_as_accurate_and_no_dearer():
    document = table(
        dense=((0.90, 0.90), 9e6, 0.9),
        lora=((0.91, 0.93), 5e6, 1.0),
        thin_04=((0.89, 0.91), 2e6, 0.5),
        head=((0.5, 0.5), 1e6, 0.1),
    )
    by_name = {row["name"]: row["beaten_by"] for row in document["rows"]}
    assert [b["name"] for b in by_name["dense"]["memory"]] == ["lora-r16", "thin-0.4"]
    assert [b["name"] for b in by_name["dense"]["time"]] == ["thin-0.4"]
    assert [b["clear"] for b in by_name["dense"]["memory"]] == [True, False]  # equal means are no clear gain
    assert by_name["thin-0.4"] == {"memory": [], "time": []} == by_name["head"] == by_name["thin-0.4"]
    assert verdicts(document["rows"]) == [
        "thin-0.4: at no more memory, no peer is as accurate; at no more time, no peer is as accurate."
    ]
    beaten = table(dense=((0.90, 0.90), 1e6, 0.9), thin_04=((0.89, 0.89), 2e6, 0.5))
    assert verdicts(beaten["rows"]) == [
        "thin-0.4: at no more memory, better: dense (+1.00 points); at no more time, no peer is as accurate."
    ]


def test_runs_that_diverged_or_are_missing_stay_in_the_table():
    cells = {
        "dense": {
            (1e-4, 0): cell("dense", 0, 0.9, 1, 1.0),
            (1e-4, 1): cell("dense", 1, 0.9, 1, 1.0, status="diverged", record=None, test=None),
        }
    }
    document = frontier_table([ROWS["dense"], ROWS["head"]], cells, SETTINGS)
    dense, head = document["rows"]
    assert (
        dense["seeds"] == [0]
        and dense["ended"] == {0: "completed", 1: "diverged"}
        and dense["test_accuracy"]["std"] is None
    )
    assert head["learning_rate"] is None and table_cells(head)[1:] == ["-", "-", "0", *["-"] * 7]
    assert len(to_csv(document).splitlines()) == 3


def test_the_page_stands_alone(tmp_path):
    pytest.importorskip("matplotlib")
    document = table(dense=((0.90, 0.90), 9e6, 0.9), thin_04=((0.89, 0.91), 2e6, 0.5))
    document["rows"][1]["subspaces"] = SUBSPACES
    page = to_html(document)
    assert page.count("<svg") == 4 and "http://www.w3.org" in page and "<script" not in page and "src=" not in page
    assert "bench &lt;it&gt;" in page and "no peer is as accurate" in page and "<i>thin-0.4</i>" in page
    assert to_markdown(document).splitlines()[0].startswith("| row | rate |")
    assert to_html(table()).count("<svg") == 1  # nothing has been run yet
