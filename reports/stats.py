"""The statistics of a report: intervals, tests, ranks. Each function says when it has too few runs."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

LEVEL = 0.05
FEWEST_SEEDS = 3
"""For a confidence interval: with two seeds, Student's t makes it 9 times as wide as the difference between the two."""
FEWEST_PAIRS = 6
"""For Wilcoxon's test: with fewer pairs that differ, no outcome is significant."""
FEWEST_SETTINGS = 5
FEWEST_METHODS = 3
"""For Friedman's test: scipy needs three methods, and its chi-square is coarse with few settings; five are few."""

TO_TARGET = ("round", "megabytes", "elapsed", "evaluating")

Array = npt.NDArray[np.float64]


def interval(values: "pd.Series[float]") -> tuple[float, float] | None:
    """Return Student's 95 % confidence interval of the mean over seeds; None with fewer than three."""
    n = len(values)
    if n < FEWEST_SEEDS:
        return None
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * float(values.std(ddof=1)) / math.sqrt(n)
    return float(values.mean()) - half, float(values.mean()) + half


def paired(a: Array, b: Array) -> float | None:
    """Return the one-sided p-value of Wilcoxon's signed-rank test that `a` is higher; None if too few pairs differ."""
    differences = a - b
    differences = differences[np.isfinite(differences) & (differences != 0)]
    if len(differences) < FEWEST_PAIRS:
        return None
    return float(stats.wilcoxon(differences, alternative="greater").pvalue)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Return Holm's adjusted p-values. They bound the probability that any of the differences is false."""
    out, highest = {}, 0.0
    for i, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - i) * p_values[name]))
        out[name] = highest
    return out


@dataclass(frozen=True)
class Ranks:
    """Average ranks over settings, 1 the best, with Friedman's p-value and Nemenyi's critical difference at 5 %.

    Demsar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR 2006, sections 3.2.2 and 3.2.
    """

    ranks: "pd.Series[float]"
    settings: int
    p_value: float
    difference: float


def ranks(scores: pd.DataFrame, *, higher_is_better: bool = True) -> Ranks | str:
    """Return the ranks of the columns of `scores` [settings, methods], or the reason why there are none.

    A setting counts only if every method has a score in it.
    """
    complete = scores.dropna()
    n, k = complete.shape
    if k < FEWEST_METHODS or n < FEWEST_SETTINGS:
        return (
            f"Average ranks need at least {FEWEST_METHODS} methods, and {FEWEST_SETTINGS} settings that all of them "
            f"ran. This table has {k} methods and {n} such settings."
        )
    each = complete.rank(axis=1, ascending=not higher_is_better)
    if (each.nunique(axis=1) == 1).all():
        return "All methods are tied in all settings."
    p_value = float(stats.friedmanchisquare(*(complete[method] for method in complete)).pvalue)
    q = float(stats.studentized_range.ppf(1 - LEVEL, k, np.inf)) / math.sqrt(2)
    return Ranks(each.mean().sort_values(), n, p_value, q * math.sqrt(k * (k + 1) / (6 * n)))


def cliques(found: Ranks) -> list[tuple[str, str]]:
    """Return the first and last method of each longest group whose ranks do not differ significantly."""
    names, values = list(found.ranks.index), found.ranks.to_numpy()
    out: list[tuple[int, int]] = []
    for i in range(len(names)):
        j = int(np.searchsorted(values, values[i] + found.difference, side="left")) - 1
        if j > i and (not out or j > out[-1][1]):
            out.append((i, j))
    return [(names[i], names[j]) for i, j in out]


def costs_to(curve: pd.DataFrame, target: float) -> "pd.Series[float] | None":
    """Return the costs until the first evaluation of the run's `curve` that reaches `target`; None if none does.

    They are the round, megabytes, seconds of training (`elapsed`) and seconds of evaluation (`evaluating`).
    """
    reached = curve[curve["accuracy"] >= target]
    return None if reached.empty else reached.iloc[0][list(TO_TARGET)].astype(float)
