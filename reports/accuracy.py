"""The tables of a report, as values, and as Markdown, LaTeX, CSV and for the terminal."""

import csv
import dataclasses
import io
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pflbench.spec import RunSpec

from . import stats
from .frames import COLUMNS, METRICS, SEEDS, SELECTIONS, Runs, client_scores, scores

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_PER_CLIENT = {"accuracy": "accuracy", "accuracy_mean": "accuracy", "global_accuracy": "global_accuracy"}
"""Metrics that are means over clients, and the client's value: these can be compared client by client."""
_ALWAYS = ("clients", "join_ratio", "rounds", "local_epochs", "batch_size", "lr", "model")


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

    def text(self) -> str:
        """Return mean and standard deviation in percent."""
        return f"{100 * self.mean:.2f}" + ("" if self.std is None else f" ± {100 * self.std:.2f}")


@dataclass(frozen=True)
class AccuracyTable:
    """Methods x settings of one protocol. `columns` has the label (dataset, partition) of each setting by number."""

    protocol: int
    title: str
    metric: str
    selection: str
    rows: list[str]
    columns: dict[int, tuple[str, str]]
    cells: dict[tuple[str, int], Cell]
    notes: list[str]

    def row(self, method: str) -> list[Cell | None]:
        """Return a method's cells, None where it has no run."""
        return [self.cells.get((method, setting)) for setting in self.columns]


class Comparisons:
    """Paired tests between the methods of each setting: over all pairs of the same seed and the same client."""

    def __init__(self, runs: Runs, metric: str, selection: str) -> None:
        self.possible = metric in _PER_CLIENT
        self._p: dict[tuple[int, str, str], float | None] = {}
        if self.possible:
            values = client_scores(runs, _PER_CLIENT[metric], selection)
            for setting, group in runs.runs.groupby("setting"):
                self._compare(int(str(setting)), group, values)

    def _compare(self, setting: int, group: pd.DataFrame, values: pd.DataFrame) -> None:
        keys = group[[*SEEDS, "partition_fingerprint"]].map(str).agg(" ".join, axis=1)
        of = {
            method: {key: values.loc[run].to_numpy() for key, run in zip(keys[own.index], own["run"], strict=True)}
            for method, own in group.groupby("method")
        }
        for a, b in itertools.combinations(of, 2):
            common = [key for key in of[a] if key in of[b]]
            if common:
                mine, others = (np.concatenate([of[m][key] for key in common]) for m in (a, b))
                self._p[setting, str(a), str(b)] = stats.paired(mine, others)
                self._p[setting, str(b), str(a)] = stats.paired(others, mine)

    def better(self, setting: int, a: str, b: str) -> float | None:
        """Return the p-value for `a` being better than `b`; None where there is nothing to test."""
        return self._p.get((setting, a, b))


def accuracy_tables(runs: Runs, metric: str, selection: str, tests: Comparisons) -> list[AccuracyTable]:
    """Return a table for each protocol among the runs."""
    values = runs.runs.set_index("run").assign(score=scores(runs, metric, selection))
    settings = runs.settings()
    out = []
    for protocol, group in values.groupby("protocol"):
        columns = labels(runs, settings[settings["protocol"] == protocol])
        cells: dict[tuple[str, int], Cell] = {}
        for (method, setting), own in group.groupby(["method", "setting"]):
            found = own["score"].dropna()
            if len(found):
                std = float(found.std(ddof=1)) if len(found) > 1 else None
                cells[str(method), int(str(setting))] = Cell(
                    float(found.mean()), std, stats.interval(found), tuple(map(str, found.index))
                )
        rows = sorted(group["method"].unique())
        notes = [*_mark(cells, columns, metric, tests), *_seeds(cells)]
        title = describe(settings[settings["protocol"] == protocol].iloc[0])
        out.append(AccuracyTable(int(str(protocol)), title, metric, selection, rows, columns, cells, notes))
    return out


def best_of(metric: str, values: Mapping[str, float]) -> str:
    """Return the name of the best value: the highest, or the lowest deviation."""
    return (min if metric == "accuracy_std" else max)(values, key=values.__getitem__)


def _mark(cells: dict[tuple[str, int], Cell], columns: Mapping[int, Any], metric: str, tests: Comparisons) -> list[str]:
    """Mark the best of each column and what is not significantly worse; return what to say of that."""
    untested = False
    for setting in columns:
        own = {method: cell.mean for (method, s), cell in cells.items() if s == setting}
        if len(own) < 2:
            continue
        best = best_of(metric, own)
        for method, value in own.items():
            if value == own[best]:
                cells[method, setting] = dataclasses.replace(cells[method, setting], mark="best")
        p_values = {m: tests.better(setting, best, m) for m in own if own[m] != own[best]}
        known = {m: p for m, p in p_values.items() if p is not None}
        untested |= tests.possible and len(known) < len(p_values)
        for method, p in stats.holm(known).items():
            if p >= stats.LEVEL:
                cells[method, setting] = dataclasses.replace(cells[method, setting], mark="close")
    if not tests.possible:
        return ["Bold: the best. This metric is one number for all clients, so nothing is compared client by client."]
    out = [
        "Bold: the best. Underlined: not significantly worse than it: Wilcoxon's signed-rank test, one-sided at 5 %, "
        "of the clients' accuracies, paired over seeds and clients, with Holm's correction over the methods of a "
        "column. Clients of one run are not independent of each other: take the marks as indications."
    ]
    if untested:
        out.append(f"Fewer than {stats.FEWEST_PAIRS} pairs differ somewhere: there nothing is marked but the best.")
    return out


def _seeds(cells: Mapping[tuple[str, int], Cell]) -> list[str]:
    counts = sorted({len(cell.runs) for cell in cells.values()})
    if counts == [1]:
        return ["One seed: there is no standard deviation, and differences may be chance."]
    out = [f"± standard deviation over seeds; {' to '.join(map(str, sorted({counts[0], counts[-1]})))} seeds a cell."]
    if counts[0] < stats.FEWEST_SEEDS:
        out.append(f"Confidence intervals are given for {stats.FEWEST_SEEDS} seeds or more.")
    return out


def labels(runs: Runs, settings: pd.DataFrame) -> dict[int, tuple[str, str]]:
    """Return (dataset, partition) of each setting, with as much detail as tells them apart."""
    data = runs.runs.groupby("setting")["data_fingerprint"].first()

    def label(row: "pd.Series[Any]") -> tuple[str, str]:
        kind = {
            "dirichlet": f"α={row['alpha']:g}" if row["alpha"] is not None else "α",
            "pathological": f"{row['classes_per_client']:.0f} classes" if row["classes_per_client"] is not None else "",
        }.get(row["partition"], str(row["partition"]))
        plain = RunSpec(partition=row["partition"]).normalised().balanced
        if row["partition"] in ("dirichlet", "iid", "pathological") and bool(row["balanced"]) != bool(plain):
            kind += ", balanced" if row["balanced"] else ", unbalanced"
        return str(row["dataset"]).partition("@")[0], kind  # the hash says what `data` says

    found = {int(str(number)): label(row) for number, row in settings.iterrows()}
    for detail in ("min_samples", "data"):
        counts = pd.Series(list(found.values())).value_counts()
        for number, (dataset, kind) in found.items():
            if counts[(dataset, kind)] > 1:
                value = str(data[number])[:6] if detail == "data" else str(settings.loc[number, detail])
                found[number] = dataset, f"{kind}, {detail} {value}"
    return found


def describe(row: "pd.Series[Any]") -> str:
    """Return a protocol in words: its main settings, and the others that are not pflbench's defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(RunSpec)}
    names = [n for n in row.index if n in defaults and n not in COLUMNS and n != "algo"]
    shown = [n for n in names if n in _ALWAYS or not (row[n] == defaults[n] or pd.isna(row[n]))]
    return ", ".join(f"{name.replace('_', ' ')} {_plain(row[name])}" for name in sorted(shown, key=_order))


def _order(name: str) -> int:
    return _ALWAYS.index(name) if name in _ALWAYS else len(_ALWAYS)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def heading(table: AccuracyTable) -> str:
    """Return what the numbers of a table are."""
    text = f"{METRICS[table.metric]}; {SELECTIONS[table.selection]}; in percent"
    return text[0].upper() + text[1:]


def markdown(table: AccuracyTable) -> str:
    """Return the table as Markdown."""

    def cell(found: Cell | None) -> str:
        if found is None:
            return "missing"
        return {"best": "**{}**", "close": "<u>{}</u>", "": "{}"}[found.mark].format(found.text())

    head = ["method", *(f"{dataset}, {kind}" for dataset, kind in table.columns.values())]
    lines = [head, ["---", *("---:" for _ in table.columns)]]
    lines += [[method, *map(cell, table.row(method))] for method in table.rows]
    text = "\n".join(f"| {' | '.join(part.replace('|', '/') for part in line)} |" for line in lines)
    notes = "".join(f"- {note}\n" for note in table.notes)
    return f"{heading(table)}. Protocol: {table.title}.\n\n{text}\n\n{notes}"


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "α": r"$\alpha$"} | {
    char: "\\" + char for char in "&%$#_{}"
}


def tex(text: str) -> str:
    """Return `text` with what LaTeX would read otherwise escaped."""
    return "".join(_TEX.get(char, char) for char in text)


def latex(table: AccuracyTable) -> str:
    """Return the table as LaTeX, for a document with `booktabs`."""

    def cell(found: Cell | None) -> str:
        if found is None:
            return "--"
        number = found.text().replace(" ± ", r"\,$\pm$\,")
        return {"best": r"\textbf{{{}}}", "close": r"\underline{{{}}}", "": "{}"}[found.mark].format(number)

    groups = [(name, len(list(found))) for name, found in itertools.groupby(d for d, _ in table.columns.values())]
    top = " & ".join(rf"\multicolumn{{{n}}}{{c}}{{{tex(name)}}}" for name, n in groups)
    ends = list(itertools.accumulate((n for _, n in groups), initial=1))
    rules = " ".join(rf"\cmidrule(lr){{{a + 1}-{b}}}" for a, b in itertools.pairwise(ends))
    body = "\n".join(rf"  {tex(m)} & {' & '.join(map(cell, table.row(m)))} \\" for m in table.rows)
    notes = "".join(f"% {line}\n" for line in (f"{heading(table)}. Protocol: {table.title}.", *table.notes))
    return rf"""{notes.replace("±", "+-").replace("α", "alpha")}\begin{{tabular}}{{l{"r" * len(table.columns)}}}
  \toprule
  & {top} \\
  {rules}
  method & {" & ".join(tex(kind) for _, kind in table.columns.values())} \\
  \midrule
{body}
  \bottomrule
\end{{tabular}}
"""


def rows(table: AccuracyTable) -> Iterator[dict[str, Any]]:
    """Yield a dict for each cell, also for the missing ones."""
    for method in table.rows:
        for (dataset, kind), cell in zip(table.columns.values(), table.row(method), strict=True):
            found = cell or Cell(np.nan, None, None, ())
            low, high = found.interval or (None, None)
            yield {
                "protocol": table.title, "dataset": dataset, "partition": kind, "method": method,
                "metric": table.metric, "selection": table.selection, "mean": None if cell is None else found.mean,
                "std": found.std, "ci95_low": low, "ci95_high": high, "seeds": len(found.runs), "mark": found.mark,
                "runs": " ".join(found.runs),
            }  # fmt: skip


def csv_text(tables: list[AccuracyTable]) -> str:
    """Return all tables as one CSV, a row per cell. Fractions, and the ids of the runs."""
    lines = [row for table in tables for row in rows(table)]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def terminal(table: AccuracyTable) -> "RichTable":
    """Return the table for a terminal."""
    import rich.box
    from rich.table import Table
    from rich.text import Text

    out = Table(title=heading(table), caption=table.title, box=rich.box.SIMPLE_HEAD)
    out.title_justify = out.caption_justify = "left"
    out.add_column("method", no_wrap=True)
    for dataset, kind in table.columns.values():
        out.add_column(f"{dataset}\n{kind}", justify="right", no_wrap=True)
    for method in table.rows:
        styles = {"best": "bold", "close": "underline", "": ""}
        cells = [Text("missing", "dim") if c is None else Text(c.text(), styles[c.mark]) for c in table.row(method)]
        out.add_row(Text(method), *cells)
    return out


@dataclass(frozen=True)
class Duels:
    """Wins, ties and losses of each method against each other, over the settings in which both have runs."""

    methods: list[str]
    counts: dict[tuple[str, str], tuple[int, int, int]]

    def text(self, a: str, b: str) -> str:
        """Return "wins/ties/losses" of `a` against `b`."""
        found = self.counts.get((a, b))
        return "" if a == b or found is None else "/".join(map(str, found))


def duels(table: AccuracyTable, tests: Comparisons) -> Duels | str:
    """Return the matrix, or why there is none. A win or loss is a difference that Wilcoxon's test, at 5 %, finds."""
    if not tests.possible:
        return "Wins and losses need a metric that every client has."
    counts: dict[tuple[str, str], list[int]] = {}
    for setting in table.columns:
        for a, b in itertools.permutations(table.rows, 2):
            better, worse = tests.better(setting, a, b), tests.better(setting, b, a)
            if better is not None and worse is not None:
                place = 0 if better < stats.LEVEL / 2 else 2 if worse < stats.LEVEL / 2 else 1
                counts.setdefault((a, b), [0, 0, 0])[place] += 1
    if not counts:
        return "No two methods have runs of the same seeds in one setting, so there is nothing to compare in pairs."
    return Duels(table.rows, {pair: (w, t, lost) for pair, (w, t, lost) in counts.items()})
