"""The tables of a report, as values: cells, marks, and wins and losses. `render` writes them as text."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd

from pflbench.spec import RunSpec
from pflbench.store.schema import SEEDS

from . import stats
from .frames import Runs, client_scores, covered, in_order, scores, titles

PER_CLIENT = {
    "accuracy": "accuracy",
    "accuracy_mean": "accuracy",
    "global_accuracy": "global_accuracy",
    "own_accuracy": "own_accuracy",
    "own_accuracy_mean": "own_accuracy",
    "mixed_accuracy": "mixed_accuracy",
}
"""Metrics that are means over clients, with the name of the client's value: they can be compared client by client."""
_ALWAYS = (
    "dataset",
    "partition",
    "alpha",
    "clients",
    "join_ratio",
    "rounds",
    "local_epochs",
    "batch_size",
    "lr",
    "model",
)


@dataclass(frozen=True)
class Cell:
    """A method in a setting: mean over seeds (a fraction), standard deviation (None for one seed), and the runs.

    `mark` is "best", "close" (not significantly worse than the best), or "".
    """

    mean: float
    std: float | None
    interval: tuple[float, float] | None
    runs: tuple[str, ...]
    mark: str = ""

    @classmethod
    def of(cls, values: "pd.Series[float]") -> Self | None:
        """Return the cell of runs with these values, by their ids; None if no value is known."""
        found = values.dropna()
        if found.empty:
            return None
        std = float(found.std(ddof=1)) if len(found) > 1 else None
        return cls(float(found.mean()), std, stats.interval(found), tuple(map(str, found.index)))

    @property
    def seeds(self) -> int:
        """How many runs there are."""
        return len(self.runs)

    def text(self) -> str:
        """Return mean and standard deviation in percent."""
        return f"{100 * self.mean:.2f}" + ("" if self.std is None else f" ± {100 * self.std:.2f}")


@dataclass(frozen=True)
class AccuracyTable:
    """Methods x settings of one protocol.

    `columns` has the labels of each setting by number: one for each of `levels`, the outer head first. `algos` has the
    id of each method in `rows`.
    """

    protocol: int
    title: str
    metric: str
    selection: str
    rows: list[str]
    algos: dict[str, str]
    levels: tuple[str, ...]
    columns: dict[int, tuple[str, ...]]
    cells: dict[tuple[str, int], Cell]
    notes: list[str]

    @property
    def heads(self) -> list[list[tuple[str, int]]]:
        """The lines of the table's head, the outermost first: texts, with the number of columns below each."""
        outer = [[label[:depth] for label in self.columns.values()] for depth in range(1, len(self.levels) + 1)]
        return [[(label[-1], len(list(group))) for label, group in itertools.groupby(line)] for line in outer]

    def row(self, method: str) -> list[Cell | None]:
        """Return a method's cells, None for a setting without a run."""
        return [self.cells.get((method, setting)) for setting in self.columns]


class Comparisons:
    """Paired tests between the methods of each setting. A pair is the same client in two runs of the same seed."""

    def __init__(self, runs: Runs, metric: str, selection: str) -> None:
        self.possible = metric in PER_CLIENT
        self._p: dict[tuple[int, str, str], float | None] = {}
        if self.possible:
            values = client_scores(runs, PER_CLIENT[metric], selection).reindex(runs.runs["run"])
            for setting, group in runs.runs.groupby("setting"):
                self._compare(int(str(setting)), group, values)

    def _compare(self, setting: int, group: pd.DataFrame, values: pd.DataFrame) -> None:
        keys = group[[*SEEDS, "partition_fingerprint"]].map(str).agg(" ".join, axis=1)
        of = {
            method: {key: values.loc[run].to_numpy() for key, run in zip(keys[rows.index], rows["run"], strict=True)}
            for method, rows in group.groupby("method")
        }
        for a, b in itertools.combinations(of, 2):
            common = [key for key in of[a] if key in of[b]]
            if common:
                of_a, of_b = (np.concatenate([of[m][key] for key in common]) for m in (a, b))
                self._p[setting, str(a), str(b)] = stats.paired(of_a, of_b)
                self._p[setting, str(b), str(a)] = stats.paired(of_b, of_a)

    def untested(self, setting: int, a: str, b: str) -> bool:
        """Return whether `a` and `b` have runs of the same seeds, but too few of their clients differ for a test."""
        return (setting, a, b) in self._p and self._p[setting, a, b] is None

    def better(self, setting: int, a: str, b: str) -> float | None:
        """Return the p-value of the test that `a` is better than `b`; None if there is no test."""
        return self._p.get((setting, a, b))


def accuracy_tables(runs: Runs, metric: str, selection: str, tests: Comparisons) -> list[AccuracyTable]:
    """Return a table for each protocol among the runs."""
    values = runs.runs.set_index("run").assign(score=scores(runs, metric, selection))
    settings = runs.settings()
    out = []
    for protocol, group in values.groupby("protocol"):
        columns = labels(runs, settings[settings["protocol"] == protocol])
        cells: dict[tuple[str, int], Cell] = {}
        for (method, setting), of_cell in group.groupby(["method", "setting"]):
            if cell := Cell.of(of_cell["score"]):
                cells[str(method), int(str(setting))] = cell
        rows = in_order(group["method"].unique())
        algos = dict(zip(group["method"], group["algo"], strict=True))
        notes = [*_mark(cells, columns, metric, tests), *_seeds(cells), *_sources(runs, algos), *_devices(group)]
        title = describe(settings[settings["protocol"] == protocol].iloc[0], runs.columns)
        out.append(
            AccuracyTable(
                int(str(protocol)), title, metric, selection, rows, algos, runs.columns, columns, cells, notes
            )
        )
    return out


def best_of(metric: str, values: Mapping[str, float]) -> str:
    """Return the name of the best value: the highest, or the lowest deviation."""
    return (min if metric.endswith("_std") else max)(values, key=values.__getitem__)


def _mark(cells: dict[tuple[str, int], Cell], columns: Mapping[int, Any], metric: str, tests: Comparisons) -> list[str]:
    """Mark the best method of each column, and those not significantly worse; return the notes on the marks."""
    incomplete = False
    for setting in columns:
        means = {method: cell.mean for (method, s), cell in cells.items() if s == setting}
        if len(means) < 2:
            continue
        best = best_of(metric, means)
        for method, value in means.items():
            if value == means[best]:
                cells[method, setting] = dataclasses.replace(cells[method, setting], mark="best")
        p_values = {m: tests.better(setting, best, m) for m in means if means[m] != means[best]}
        known = {m: p for m, p in p_values.items() if p is not None}
        incomplete |= tests.possible and len(known) < len(p_values)
        for method, p in stats.holm(known).items():
            if p >= stats.LEVEL:
                cells[method, setting] = dataclasses.replace(cells[method, setting], mark="close")
    if not tests.possible:
        return [
            "The best method of a column is bold. The metric is one number for all clients, so no test compares the "
            "methods client by client."
        ]
    out = [
        "The best method of a column is bold. Methods that are not significantly worse are underlined. The test is "
        "Wilcoxon's signed-rank test, one-sided at 5 %, of the clients' accuracies, paired over seeds and clients, "
        "with Holm's correction over the methods of a column. Clients of one run are not independent of each other, so "
        "the marks are indications."
    ]
    if incomplete:
        out.append(
            f"Some methods differ from the best method in fewer than {stats.FEWEST_PAIRS} pairs. They are not tested, "
            "and not underlined."
        )
    return out


def _seeds(cells: Mapping[tuple[str, int], Cell]) -> list[str]:
    counts = sorted({cell.seeds for cell in cells.values()})
    if not counts:  # no run of the protocol has the metric
        return []
    if counts == [1]:
        return ["Each cell is one seed: it has no standard deviation, and differences may be chance."]
    between = " to ".join(map(str, sorted({counts[0], counts[-1]})))
    out = [f"± is the standard deviation over seeds. Each cell has {between} seeds."]
    if counts[0] < stats.FEWEST_SEEDS:
        out.append(f"Cells of {stats.FEWEST_SEEDS} seeds or more have a confidence interval.")
    return out


def _sources(runs: Runs, algos: Mapping[str, str]) -> list[str]:
    """Return a note on the methods in `algos` whose runs have different sources."""
    count = runs.runs.groupby("algo")["algorithm_fingerprint"].nunique()
    mixed = [algo for algo in {*algos.values()} if count[algo] > 1]
    if not mixed:
        return []
    title = titles(runs.runs["algo"].unique())
    names = ", ".join(in_order(title[algo] for algo in mixed))
    return [
        f"Runs of {names} have different sources: the code of the method or of pflbench changed between them. Each "
        "source has a separate row, with the first six digits of its fingerprint. Nothing is averaged over sources."
    ]


def _devices(runs: pd.DataFrame) -> list[str]:
    """Return a note if several kinds of devices computed `runs`."""
    kinds = [f"{kind} ({count} runs)" for kind, count in runs["device"].value_counts().sort_index().items()]
    text = f"Several kinds of devices computed these runs: {', '.join(kinds)}. They differ in rounding."
    return [text] if len(kinds) > 1 else []


def labels(runs: Runs, settings: pd.DataFrame) -> dict[int, tuple[str, ...]]:
    """Return the labels of each setting, one for each column, with the details that distinguish the settings."""
    data = runs.runs.groupby("setting")["data_fingerprint"].first()
    found = {int(str(n)): tuple(_label(row, column) for column in runs.columns) for n, row in settings.iterrows()}
    for detail in ("min_samples", "data"):
        count = Counter(found.values())
        place = [name for name in ("partition", "dataset") if name in runs.columns]
        at = runs.columns.index(place[0]) if place else len(runs.columns) - 1
        for number, label in found.items():
            if count[label] > 1:
                value = str(data[number])[:6] if detail == "data" else str(settings.loc[number, detail])
                found[number] = *label[:at], f"{label[at]}, {detail} {value}", *label[at + 1 :]
    return found


def _label(row: "pd.Series[Any]", column: str) -> str:
    """Return the head of a setting in the `column` of a table; `row` has its values."""
    if column == "dataset":
        return str(row["dataset"]).partition("@")[0]  # a fingerprint follows, as in `data_fingerprint`
    if column != "partition":
        return short(column, row[column])
    kind = {
        "dirichlet": short("alpha", row["alpha"]) if row["alpha"] is not None else "α",
        "pathological": f"{row['classes_per_client']:.0f} classes" if row["classes_per_client"] is not None else "",
    }.get(row["partition"], str(row["partition"]))
    plain = RunSpec(partition=row["partition"]).normalised().balanced
    if row["partition"] in ("dirichlet", "iid", "pathological") and bool(row["balanced"]) != bool(plain):
        kind += ", balanced" if row["balanced"] else ", unbalanced"
    return kind


def short(name: str, value: Any) -> str:
    """Return a setting with its value as a table's head has it, for example "P=0.2"."""
    words = {"dataset": "", "alpha": "α=", "join_ratio": "P=", "local_epochs": "E="}
    return f"{words.get(name, name.replace('_', ' ') + ' ')}{plain(value)}"


def describe(row: "pd.Series[Any]", columns: Sequence[str]) -> str:
    """Return a protocol in words: its main settings, and all others that differ from pflbench's defaults.

    Settings that the `columns` of a table show are left out.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(RunSpec)}
    names = [n for n in row.index if n in defaults and n not in (*covered(columns), "algo")]
    shown = [n for n in names if not pd.isna(row[n]) and (n in _ALWAYS or row[n] != defaults[n])]
    return ", ".join(f"{name.replace('_', ' ')} {plain(row[name])}" for name in sorted(shown, key=_order))


def _order(name: str) -> int:
    return _ALWAYS.index(name) if name in _ALWAYS else len(_ALWAYS)


def plain(value: Any) -> str:
    """Return the value of a setting as text."""
    if pd.isna(value):
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Duels:
    """Wins, ties and losses of each method against each other method, over the settings in which both have runs."""

    methods: list[str]
    counts: dict[tuple[str, str], tuple[int, int, int]]
    untested: int
    """How often two methods have runs of the same seeds in a setting, but too few clients differ for a test."""

    def text(self, a: str, b: str) -> str:
        """Return "wins/ties/losses" of `a` against `b`."""
        found = self.counts.get((a, b))
        return "" if a == b or found is None else "/".join(map(str, found))


def duels(table: AccuracyTable, tests: Comparisons) -> Duels | str:
    """Return the matrix, or the reason why there is none. A win or a loss is a difference significant at 5 %."""
    if not tests.possible:
        return "Wins and losses need a metric that each client has."
    counts: dict[tuple[str, str], list[int]] = {}
    untested = sum(tests.untested(s, a, b) for s in table.columns for a, b in itertools.combinations(table.rows, 2))
    for setting in table.columns:
        for a, b in itertools.permutations(table.rows, 2):
            better, worse = tests.better(setting, a, b), tests.better(setting, b, a)
            if better is not None and worse is not None:
                place = 0 if better < stats.LEVEL / 2 else 2 if worse < stats.LEVEL / 2 else 1
                counts.setdefault((a, b), [0, 0, 0])[place] += 1
    if not counts and untested:
        return f"In all settings fewer than {stats.FEWEST_PAIRS} pairs of any two methods differ, too few for a test."
    if not counts:
        return "No two methods have runs of the same seeds in one setting, so no runs can be compared in pairs."
    return Duels(table.rows, {pair: (w, t, lost) for pair, (w, t, lost) in counts.items()}, untested)


def leaders(table: AccuracyTable, tests: Comparisons) -> list[str]:
    """Return in words which method leads in each setting, by how much, and whether that is significant."""
    word = "has the lowest value," if table.metric.endswith("_std") else "leads with"
    out = []
    for setting, labels in table.columns.items():
        cells = {method: cell for method in table.rows if (cell := table.cells.get((method, setting)))}
        means = {method: cell.mean for method, cell in cells.items()}
        if len(means) < 2:
            out += [f"{', '.join(labels)}: only {method} has runs." for method in means]
            continue
        first = best_of(table.metric, means)
        second = best_of(table.metric, {method: mean for method, mean in means.items() if method != first})
        gap = 100 * abs(means[first] - means[second])
        if cells[second].mark == "best":
            how = "a tie"
        elif tests.better(setting, first, second) is None:
            how = "not tested"
        else:
            how = "not significant" if cells[second].mark == "close" else "significant"
        alone = ", one seed" if cells[first].seeds == 1 else ""
        value = f"{100 * means[first]:.2f} %"
        out.append(f"{', '.join(labels)}: {first} {word} {value}, {gap:.2f} points ahead of {second} ({how}{alone}).")
    return out
