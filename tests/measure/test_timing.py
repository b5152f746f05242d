import itertools

import pytest

from thintune.errors import ConfigError
from thintune.measure import interleave, median_and_iqr, timing


def test_median_and_quartiles_of_known_values():
    assert median_and_iqr([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0)
    assert median_and_iqr([1.0, 2.0, 3.0, 4.0]) == (2.5, 1.5)
    assert median_and_iqr((2.0, 6.0)) == (4.0, 2.0)


def test_what_cannot_be_told_is_none():
    assert median_and_iqr([]) == (None, None)
    assert median_and_iqr([7.0]) == (7.0, None)


def recorders(names: str) -> tuple[list[str], dict]:
    calls: list[str] = []
    return calls, {name: (lambda name=name: calls.append(name)) for name in names}


def test_the_callables_take_turns_and_the_order_rotates():
    calls, fns = recorders("abc")
    times = interleave(fns, repeats=4, warmup=0)
    assert calls == [*"abc", *"bca", *"cab", *"abc"]
    assert list(times) == ["a", "b", "c"]
    assert [len(values) for values in times.values()] == [4, 4, 4]


def test_warm_up_rounds_run_but_are_not_timed():
    calls, fns = recorders("ab")
    times = interleave(fns, repeats=1, warmup=2)
    assert calls == [*"ab", *"ba", *"ab"]
    assert [len(values) for values in times.values()] == [1, 1]


def test_each_time_goes_to_the_callable_that_took_it(monkeypatch):
    clock = itertools.count()
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        next(clock)
        now[0] += seconds

    fns = {"slow": lambda: spend(5.0), "fast": lambda: spend(2.0)}
    assert interleave(fns, repeats=3, warmup=1) == {"slow": [5.0] * 3, "fast": [2.0] * 3}
    assert next(clock) == 8


def test_no_callables_no_times():
    assert interleave({}, repeats=2, warmup=1) == {}


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 0), (1, -1)])
def test_rounds_out_of_range(repeats, warmup):
    with pytest.raises(ConfigError, match=f"got {repeats} and {warmup}"):
        interleave({"a": lambda: None}, repeats=repeats, warmup=warmup)
