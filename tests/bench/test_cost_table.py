"""From cells to the table."""

import pytest

from thintune.bench.cost.bench import seconds_left
from thintune.bench.cost.rows import all_rows
from thintune.bench.cost.settings import CostSettings, settings_from_dict, settings_to_dict
from thintune.bench.cost.table import HEADINGS, cost_table, table_cells, to_markdown
from thintune.errors import ConfigError

ROWS = {row.name: row for row in all_rows(128)}


def cell(name, peak=None, seconds=None, **more):
    row = ROWS[name]
    found = {
        "status": "finished",
        "error": None,
        "row": {**vars(row), "exact_gradients": row.exact_gradients},
        "limit": None,
        "predicted_peak_bytes": None,
    }
    if peak is not None:
        found |= {"peak_above_baseline_bytes": peak, "s_per_image": seconds, "checkpoint_bytes": 5_000_000}
    return found | more


def table(cells):
    return cost_table(cells, settings_to_dict(CostSettings()))


def test_rows_are_medians_beside_the_dense_row_of_the_same_micro_batch():
    cells = [cell("dense-mb4", 3_000_000_000, [0.4]), cell("dense-mb1", 2_000_000_000, [0.5])]
    cells += [cell("thin-0.4-mb4", peak, [t]) for peak, t in ((400e6, 0.2), (500e6, 0.1), (900e6, 0.4))]
    dense, other, thin = table(cells)["rows"]
    assert thin["peak_above_baseline_bytes"] == 500e6 and thin["peak_above_baseline_bytes_range"] == [400e6, 900e6]
    assert (thin["memory_ratio_to_dense"], thin["speed_to_dense"]) == (6.0, 2.0)
    assert dense["best_of_method"] == ["time"] and other["best_of_method"] == ["memory"]
    texts = dict(zip(HEADINGS, table_cells(table(cells))[2], strict=True))
    assert texts["peak, MB"] == "500 (400-900) *" and texts["s/image"] == "0.200 (0.100-0.400) +"
    assert texts["ended"] == "finished 3x" and texts["memory"] == "6.00x" and texts["paper, MB"] == "-"


def test_killed_rows_count_as_such_and_give_no_numbers():
    limit = {"limited": True}
    cells = [cell("lora-mb4", status="killed", limit=limit), cell("lora-mb4", 10, [1.0], limit=limit)]
    (row,) = table(cells)["rows"]
    assert row["endings"] == {"killed": 1, "finished": 1} and row["peak_above_baseline_bytes"] == 10
    (texts,) = table_cells(table([cells[0]]))
    assert texts[1] == "killed" and texts[2:7] == ["-"] * 5
    (texts,) = table_cells(table([cell("lora-mb4", 10, [1.0], limit={"limited": False})]), reasons=False)
    assert texts[1] == "finished (not limited)" and texts[7] == "yes"


def test_the_page_names_what_failed():
    page = to_markdown(table([cell("galore-mb1", status="failed", error="no such library")]))
    assert "- galore-mb1: no such library" in page and "| galore-mb1 | failed | - |" in page


def test_the_time_left_is_that_of_the_same_rows_before():
    assert seconds_left({}, ["a"]) is None
    assert seconds_left({"a": [1.0, 3.0], "b": [10.0]}, ["a", "b", "c"]) == 2 + 10 + 3
    assert seconds_left({"a": [1.0]}, []) == 0


def test_settings_are_checked_and_survive_json():
    settings = CostSettings(limit="baseline+290MB", threads=2)
    assert settings_from_dict(settings_to_dict(settings)) == settings
    for wrong in ({"steps": 0}, {"classes": 1}, {"limit": "much"}, {"threads": 0}, {"timeout_s": 0}, {"seed": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            CostSettings(**wrong)
