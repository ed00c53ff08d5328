"""Against values worked out by hand, and Demsar's (JMLR 2006)."""

import itertools

import numpy as np
import pandas as pd
import pytest

from pflbench.reports import stats


def test_the_interval_is_students():
    low, high = stats.interval(pd.Series([0.1, 0.2, 0.3]))
    half = 4.30265 * 0.1 / np.sqrt(3)  # t(0.975, 2 degrees of freedom)
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-6)


def test_two_seeds_have_no_interval():
    assert stats.interval(pd.Series([0.1, 0.2])) is None


def test_wilcoxons_p_value_is_the_share_of_sign_patterns_with_as_large_a_sum():
    a = np.array([0.5, 0.7, 0.9, 0.3, 0.8, 0.61, 0.4])
    b = a - np.array([0.01, 0.02, -0.03, 0.04, 0.05, 0.06, 0.0])  # the last pair, a tie, does not count
    patterns = [
        sum(r for r, s in zip(range(1, 7), signs, strict=True) if s) for signs in itertools.product((0, 1), repeat=6)
    ]
    assert stats.paired(a, b) == pytest.approx(sum(p >= 18 for p in patterns) / 64, abs=1e-12)
    assert stats.paired(b, a) == pytest.approx(sum(p >= 3 for p in patterns) / 64, abs=1e-12)


def test_fewer_than_six_differing_pairs_are_not_tested():
    a = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, np.nan])
    assert stats.paired(a, a - np.array([0.1, 0.1, 0.1, 0.1, 0.1, 0.0, 0.1])) is None
    assert stats.paired(a, a - 0.1) == pytest.approx(1 / 64)


def test_holms_correction():
    found = stats.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.6})
    assert found == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.6})


def table(rows):
    return pd.DataFrame(rows, columns=[f"m{i}" for i in range(len(rows[0]))])


def test_the_critical_difference_is_demsars():
    """Section 3.2.2's example: 4 classifiers, 14 data sets: CD = 2.569 sqrt(4 * 5 / (6 * 14)) = 1.25."""
    draw = np.random.RandomState(0)
    found = stats.ranks(table(draw.rand(14, 4)))
    assert found.difference == pytest.approx(2.569 * np.sqrt(4 * 5 / (6 * 14)), abs=1e-3)


def test_average_ranks_and_friedmans_statistic_by_hand():
    rows = [[0.9, 0.5, 0.1], [0.8, 0.6, 0.2], [0.7, 0.9, 0.1], [0.9, 0.4, 0.3], [0.6, 0.5, 0.4]]
    found = stats.ranks(table(rows))
    assert found.ranks.to_dict() == pytest.approx({"m0": 6 / 5, "m1": 9 / 5, "m2": 15 / 5})
    chi = 12 * 5 / (3 * 4) * (sum(r**2 for r in (6 / 5, 9 / 5, 3)) - 3 * 16 / 4)
    assert found.p_value == pytest.approx(np.exp(-chi / 2), rel=1e-9)  # chi-square with 2 degrees of freedom
    lowest = stats.ranks(table(rows), higher_is_better=False)
    assert lowest.ranks.to_dict() == pytest.approx({"m0": 14 / 5, "m1": 11 / 5, "m2": 5 / 5})


def test_settings_that_a_method_lacks_are_not_ranked_and_too_few_are_said_to_be_so():
    rows = [[0.9, 0.5, 0.1]] * 5
    rows[0] = [0.9, 0.5, np.nan]
    assert stats.ranks(table(rows)) == (
        "Average ranks need at least 3 methods, and 5 settings that all of them ran. "
        "This table has 3 methods and 4 such settings."
    )
    assert "2 methods" in stats.ranks(table([[0.9, 0.5]] * 5))


def test_methods_that_are_always_tied_have_no_ranks():
    assert stats.ranks(table([[0.5, 0.5, 0.5]] * 5)) == "All methods are tied in all settings."


def test_cliques_are_the_longest_groups_within_the_critical_difference():
    ranks = pd.Series({"a": 1.0, "b": 1.5, "c": 2.2, "d": 4.0, "e": 4.4})
    assert stats.cliques(stats.Ranks(ranks, 9, 0.01, 1.25)) == [("a", "c"), ("d", "e")]
    assert stats.cliques(stats.Ranks(ranks, 9, 0.01, 1.9)) == [("a", "c"), ("c", "d"), ("d", "e")]
    assert stats.cliques(stats.Ranks(ranks, 9, 0.01, 0.1)) == []


def test_what_it_took_to_reach_a_target():
    curve = pd.DataFrame(
        {
            "round": [2, 4, 6],
            "accuracy": [0.1, 0.5, 0.4],
            "megabytes": [1, 2, 3],
            "elapsed": [5, 6, 7],
            "evaluating": [7, 8, 9],
        }
    )
    assert list(stats.costs_to(curve, 0.45)) == [4, 2, 6, 8]
    assert stats.costs_to(curve, 0.51) is None
