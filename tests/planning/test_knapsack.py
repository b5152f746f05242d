"""The dynamic programme against trying all combinations, in integers held as floats so that sums are exact."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thintune.errors import ConfigError
from thintune.planning import knapsack
from thintune.planning.knapsack import Option, choose

OPTIONS = st.builds(Option, st.integers(0, 12), st.integers(0, 9).map(float))
TABLES = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), max_size=5)


def cost(table, plan) -> int:
    return sum(layer[index].cost_bytes for layer, index in zip(table, plan, strict=True))


def error(table, plan) -> float:
    return sum(layer[index].error for layer, index in zip(table, plan, strict=True))


def least_cost(table) -> int:
    return sum(min(option.cost_bytes for option in layer) for layer in table)


def brute_force(table, budget) -> list[int]:
    """Least error, then least cost, then the lower index of the first layer that differs."""
    plans = [list(plan) for plan in itertools.product(*(range(len(layer)) for layer in table))]
    return min((p for p in plans if cost(table, p) <= budget), key=lambda p: (error(table, p), cost(table, p), p))


@given(TABLES, st.integers(0, 40))
def test_equals_brute_force_ties_included(table, spare):
    budget = least_cost(table) + spare
    assert choose(table, budget) == brute_force(table, budget)


@given(
    st.lists(
        st.lists(st.builds(Option, st.integers(0, 10**12), st.floats(0, 1e6)), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    ),
    st.floats(0, 1),
)
def test_equals_brute_force_for_real_errors_and_large_costs(table, share):
    most = sum(max(option.cost_bytes for option in layer) for layer in table)
    budget = least_cost(table) + int(share * (most - least_cost(table)))
    plan = choose(table, budget)
    assert cost(table, plan) <= budget
    assert error(table, plan) == pytest.approx(error(table, brute_force(table, budget)), rel=1e-12)


@given(TABLES, st.integers(0, 40), st.integers(1, 3))
def test_a_bounded_front_stays_within_the_budget_and_its_promise(table, spare, max_points):
    budget = least_cost(table) + spare
    plan = choose(table, budget, max_points=max_points)
    assert cost(table, plan) <= budget
    smaller = budget - len(table) * -(-spare // max_points)
    if smaller >= least_cost(table):
        assert error(table, plan) <= error(table, brute_force(table, smaller))


@given(TABLES, st.integers(0, 40), st.integers(0, 5))
def test_more_budget_is_never_worse(table, spare, more):
    budget = least_cost(table) + spare
    assert error(table, choose(table, budget + more)) <= error(table, choose(table, budget))


@given(TABLES, st.integers(1, 5))
def test_an_infeasible_budget_names_the_least_that_would_do(table, missing):
    least = least_cost(table)
    with pytest.raises(ConfigError, match=re.escape(f"raise the budget to {least} bytes")):
        choose(table, least - missing)
    assert cost(table, choose(table, least)) == least


def powers_of_two(layers: int) -> list[list[Option]]:
    """Every subset has a cost and an error of its own, and none dominates another: the worst front there is."""
    return [[Option(0, float(2**k)), Option(2**k, 0.0)] for k in range(layers)]


def test_the_front_is_bounded_and_rounding_costs_little():
    table = powers_of_two(14)  # 16384 undominated plans
    budget = 2**13 + 777
    exact = choose(table, budget)
    assert error(table, exact) == 2**14 - 1 - budget
    assert cost(table, exact) == budget
    coarse = choose(table, budget, max_points=1000)
    assert cost(table, coarse) <= budget
    assert error(table, exact) < error(table, coarse) <= 2**14 - 1 - (budget - 14 * 9)


def test_no_front_grows_beyond_the_bound(monkeypatch):
    sizes = []
    pareto = knapsack._pareto
    monkeypatch.setattr(knapsack, "_pareto", lambda points: sizes.append(len(front := pareto(points))) or front)
    choose(powers_of_two(12), 4000, max_points=100)
    overflow = next(number for number, size in enumerate(sizes) if size > 101)
    assert sizes[overflow] <= 2 * 100
    assert max(sizes[overflow + 1 :]) <= 101


def test_ties_take_the_smaller_cost_then_the_lower_index():
    assert choose([[Option(5, 1.0), Option(3, 1.0), Option(3, 1.0)]], 9) == [1]
    swap = [Option(1, 5.0), Option(5, 1.0)]
    assert choose([swap, swap], 6) == [0, 1]


def test_no_layers_no_choices():
    assert choose([], 0) == []


def test_all_problems_are_told_at_once():
    table = [[Option(1, float("nan")), Option(-2, 1.0)], [], [Option(1, float("inf")), Option(1, -0.5)]]
    with pytest.raises(ConfigError) as caught:
        choose(table, 10, max_points=0)
    message = str(caught.value)
    for part in (
        "max_points: expected at least 1, got 0",
        "layer 0, option 0: expected a finite error >= 0, got nan",
        "layer 0, option 1: expected cost_bytes >= 0, got -2",
        "layer 1: no options",
        "layer 2, option 0: expected a finite error >= 0, got inf",
        "layer 2, option 1: expected a finite error >= 0, got -0.5",
    ):
        assert part in message
