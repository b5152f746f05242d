"""Which run of a row comes next."""

import pytest

from thintune.bench.frontier.rows import all_rows, first_rates, next_rate, select_rows
from thintune.bench.frontier.settings import FrontierSettings, frontier_from_dict, frontier_to_dict
from thintune.bench.frontier.sweep import next_task, sweep, trainings_left
from thintune.config import DataConfig
from thintune.errors import ConfigError

ROWS = {row.name: row for row in all_rows()}
DENSE = ROWS["dense"]


def cell(val, test=None, status="completed"):
    return {"status": status, "record": {"val_accuracy": val}, "test": test}


def play(scores, settings, row=DENSE):
    """Runs a row to its end, every rate scoring what the function says; returns the order of its processes."""
    cells, order = {}, []
    while (task := next_task(row, cells, settings)) is not None:
        order.append((task.rate, task.seed, task.test))
        score = scores(task.rate)
        if task.test:
            cells[task.rate, task.seed]["test"] = {"accuracy": score}
        else:
            cells[task.rate, task.seed] = cell(score, status="completed" if score is not None else "diverged")
    return cells, order


def test_a_sweep_picks_the_best_validation_accuracy_then_seeds_and_tests_follow():
    settings = FrontierSettings(seeds=2)
    _, order = play(lambda rate: 0.9 if rate == 3e-5 else 0.5, settings)
    assert order == [
        *((rate, 0, False) for rate in (1e-5, 3e-5, 1e-4)),
        *((3e-5, 0, True), (3e-5, 1, False), (3e-5, 1, True)),
    ]


@pytest.mark.parametrize(("direction", "best"), [(1, 1e-3), (-1, 1e-6)])
def test_a_sweep_goes_on_while_its_best_rate_is_at_an_edge(direction, best):
    cells, order = play(lambda rate: 0.5 + direction * rate, FrontierSettings(seeds=1, extensions=2))
    assert sweep(DENSE, cells, FrontierSettings(seeds=1)).best == best
    assert len(order) == 6  # three rates, two further ones, one test
    assert len(play(lambda rate: 0.5 + direction * rate, FrontierSettings(seeds=1, extensions=0))[1]) == 4


def test_of_equal_rates_the_lower_one_and_a_diverged_one_never():
    settings = FrontierSettings(seeds=1)
    cells, _ = play(lambda rate: None if rate > 5e-5 else 0.7, settings)
    assert sweep(DENSE, cells, settings).best == min(rate for rate, _ in cells)
    cells, order = play(lambda rate: None, settings)
    assert sweep(DENSE, cells, settings).best is None and not any(test for *_, test in order)


def test_one_rate_is_not_tuned_and_the_papers_protocol_has_one():
    settings = FrontierSettings(preset="paper", seeds=1)
    assert first_rates(DENSE, settings) == (0.05,)
    assert play(lambda rate: 0.5, settings)[1] == [(0.05, 0, False), (0.05, 0, True)]
    train = settings.train_config(0.05, 0)
    assert (train.epochs, train.batch_size, train.optimizer, train.weight_decay, train.clip_norm) == (
        50,
        128,
        "sgd",
        1e-4,
        2.0,
    )
    assert first_rates(DENSE, FrontierSettings(learning_rates=(3e-4, 1e-5))) == (1e-5, 3e-4)


def test_what_is_left_counts_trainings():
    settings = FrontierSettings(seeds=3)
    assert trainings_left(DENSE, {}, settings) == 5
    cells = {(rate, 0): cell(0.9 if rate == 3e-5 else 0.1) for rate in (1e-5, 3e-5, 1e-4)}
    assert trainings_left(DENSE, cells, settings) == 2


@pytest.mark.parametrize(
    ("rate", "up", "down"), [(1e-5, 3e-5, 3e-6), (3e-4, 1e-3, 1e-4), (0.05, 0.05 * 10**0.5, 0.05 / 10**0.5)]
)
def test_neighbours_on_the_grid(rate, up, down):
    assert next_rate(rate, up=True) == pytest.approx(up) and next_rate(rate, up=False) == pytest.approx(down)
    assert rate == 0.05 or next_rate(rate, up=True) == up  # the very number, since it names a file


def test_every_row_has_a_configuration_that_leaves_the_test_split_alone():
    settings = FrontierSettings()
    for row in all_rows():
        config = row.config(settings, 1e-4, 1)
        assert config.method == row.method and config.train.seed == 1 and not config.train.evaluate_test
    assert {row.method for row in all_rows()} == {
        *("dense", "head", "lora", "lora_fa", "galore", "svd_lora", "amc", "asi", "wsi", "wasi", "thin")
    }


def test_settings_survive_json_and_bad_ones_are_refused():
    settings = FrontierSettings(learning_rates=(1e-4,), epochs=2)
    assert frontier_from_dict(frontier_to_dict(settings)) == settings
    with pytest.raises(ConfigError, match=r"no row is named 'thinn-0\.4'.*Did you mean 'thin-0\.4'"):
        select_rows("thinn-0.4")
    with pytest.raises(ConfigError, match="rates are chosen on the validation split"):
        FrontierSettings(data=DataConfig(val_fraction=0.0))
    for bad in ({"seeds": 0}, {"extensions": -1}, {"learning_rates": (0.0,)}, {"preset": "long"}, {"timeout_s": 0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            FrontierSettings(**bad)
