"""The rows as data."""

import pytest

from thintune.bench.cost.rows import all_rows, select_rows
from thintune.errors import ConfigError

ROWS = {row.name: row for row in all_rows(128)}


def test_names_are_distinct_and_every_method_is_there():
    assert len(ROWS) == len(all_rows(128))
    assert {row.method for row in ROWS.values()} == {"dense", "lora", "galore", "asi", "wsi", "wasi", "thin"}
    assert {row.kept for row in ROWS.values() if row.method == "thin"} == {0.6, 0.4, 0.25}
    for piece in ("full", "mb16", "mb4", "mb1"):
        for way in ("", "-ckpt", "-in-backward", "-in-backward-ckpt"):
            assert f"dense-{piece}{way}" in ROWS


def test_a_row_says_whether_its_gradients_are_exact():
    assert ROWS["dense-mb4"].exact_gradients == ROWS["dense-full-in-backward"].exact_gradients == "yes"
    assert ROWS["dense-mb4-in-momentum-ckpt"].exact_gradients == "yes"
    stepped = ROWS["dense-mb4-in-backward"]
    assert stepped.exact_gradients == "no: one step a micro-batch" and not stepped.exact_accumulation
    assert ROWS["galore-mb4-in-backward"].exact_accumulation
    assert ROWS["galore-mb4"].exact_gradients == "no: projected to rank 16"
    assert ROWS["lora-mb1"].exact_gradients.startswith("yes")
    for name in ("asi-mb4", "wasi-full", "thin-0.4-mb4"):
        assert ROWS[name].exact_gradients.startswith("no: ") and ROWS[name].exact_accumulation, name


def test_a_micro_batch_is_smaller_than_the_batch():
    assert all(row.micro_batch is None or row.micro_batch < 8 for row in all_rows(8))
    assert {row.micro_batch for row in all_rows(1)} == {None}


def test_patterns_choose_rows_in_the_order_of_the_table():
    found = [row.name for row in select_rows("thin-0.4-mb1, dense-mb*-ckpt", 128)]
    assert found == [
        *(f"dense-mb{n}{way}-ckpt" for n in (16, 4, 1) for way in ("", "-in-backward", "-in-momentum")),
        "thin-0.4-mb1",
    ]
    assert len(select_rows("*", 128)) == len(ROWS)


def test_a_pattern_without_a_row_is_a_mistake_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"no row is named 'dense-mb5'.*Did you mean 'dense-mb"):
        select_rows("dense-mb5", 128)
    with pytest.raises(ConfigError, match="expected the name of a row"):
        select_rows(" , ", 128)
