"""The contents of a report on runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pflbench.core import registry
from pflbench.errors import UsageError
from pflbench.published import Published

from . import plots, stats
from .accuracy import PER_CLIENT, AccuracyTable, Comparisons, Duels, accuracy_tables, duels, leaders
from .frames import Runs, in_order, scores
from .metrics import METRICS
from .published import Reproduction, hold

_SHARE = 0.9


@dataclass(frozen=True)
class Report:
    """The contents of a report.

    `look` is how each method is drawn. `tables` are those of the `metric`; `every` has those of each metric that any
    run has, and `leaders` says in words who leads. `ranks` and `duels` are by protocol: nothing is averaged over
    protocols.
    """

    runs: Runs
    metric: str
    selection: str
    look: Mapping[str, plots.Style]
    tables: list[AccuracyTable]
    every: Mapping[str, list[AccuracyTable]]
    leaders: list[str]
    ranks: dict[int, stats.Ranks | str]
    duels: dict[int, Duels | str]
    published: list[Reproduction]
    targets: dict[int, tuple[float, str, pd.DataFrame]]
    """By setting: the accuracy, a note on it, and a row per method with its mean costs over the seeds that reach it.

    Costs are NaN if no seed reaches it, or if a run's record does not have them.
    """


def make(
    runs: Runs,
    metric: str = "accuracy",
    selection: str = "last",
    target: float | None = None,
    published: Sequence[Published] = (),
) -> Report:
    """Return the report on `runs`. `target` is the accuracy, a fraction, up to which costs are compared.

    `published` has the figures of papers, which are shown beside those of the runs.

    Raises `UsageError` when there is no finished run, no run has the metric, or a name is unknown.
    """
    if runs.runs.empty:
        reasons = "".join(f"; {path}: {reason}" for path, reason in runs.left_out.head(3).itertuples(index=False))
        raise UsageError(f"runs: there is no finished run to report on{reasons}; run `pflbench sweep quick` first")
    values = scores(runs, metric, selection)
    if values.isna().all():
        raise UsageError(f"metric: no run has {metric}; choose another --metric")
    compared: dict[str | None, Comparisons] = {}  # metrics with the same values of clients share their tests
    every = {}
    for name in METRICS:
        if scores(runs, name, selection).notna().any():
            column = PER_CLIENT.get(name)
            tests = compared[column] = compared.get(column) or Comparisons(runs, name, selection)
            every[name] = accuracy_tables(runs, name, selection, tests)
    found, tests = every[metric], compared[PER_CLIENT.get(metric)]
    ranks = {table.protocol: _ranks(table) for table in found}
    wins = {table.protocol: duels(table, tests) for table in found}
    leading = [line for table in found for line in leaders(table, tests)]
    held = [hold(runs, one) for one in published]
    targets = _targets(runs, target)
    return Report(runs, metric, selection, _look(runs), found, every, leading, ranks, wins, held, targets)


def _look(runs: Runs) -> dict[str, plots.Style]:
    """Return the style of each method in all plots."""
    algos = dict(zip(runs.runs["method"], runs.runs["algo"], strict=True))
    family = {algo: registry.family(algo) for algo in {*algos.values()}}
    return plots.styles({method: family[algos[method]] for method in in_order(algos)})


def _ranks(table: AccuracyTable) -> stats.Ranks | str:
    means = {m: [np.nan if cell is None else cell.mean for cell in table.row(m)] for m in table.rows}
    return stats.ranks(pd.DataFrame(means), higher_is_better=not table.metric.endswith("_std"))


def _targets(runs: Runs, target: float | None) -> dict[int, tuple[float, str, pd.DataFrame]]:
    out = {}
    for setting, curves in plots.curves(runs).groupby("setting"):
        wanted, why = target, "You set this accuracy with --target."
        if wanted is None:
            last = curves.sort_values("round").groupby(["method", "run"])["accuracy"].last().groupby("method").mean()
            wanted = _SHARE * float(last.max())
            share = f"{100 * _SHARE:.0f} %"
            why = f"This is {share} of the best deployed accuracy after the last round. --target sets another."
        groups = {str(method): group for method, group in curves.groupby("method")}
        lines = []
        for method in in_order(groups):
            reached = [stats.costs_to(curve, wanted) for _, curve in groups[method].groupby("run")]
            good = [r for r in reached if r is not None]
            means = pd.DataFrame(good, columns=list(stats.TO_TARGET)).mean(skipna=False)
            lines.append({"method": method, **means, "reached": len(good), "seeds": len(reached)})
        out[int(str(setting))] = (wanted, f"{why} {_time(runs, int(str(setting)))}", pd.DataFrame(lines))
    return out


def _time(runs: Runs, setting: int) -> str:
    """Return a note on the seconds of a setting's runs."""
    rows = runs.runs[runs.runs["setting"] == setting]
    old = int((rows["schema"] == 1).sum())
    text = (
        "Seconds of training do not contain the evaluations. If a method fine-tunes before its evaluation, the seconds "
        "of evaluation contain the fine-tuning."
    )
    if old:
        text += (
            f" In records of schema 1 (here {old} of {len(rows)} runs) seconds of training contain the evaluations, "
            "and seconds of evaluation are unknown."
        )
    return text
