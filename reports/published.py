"""Published figures beside ours, cell by cell."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pflbench import settings
from pflbench.core import registry
from pflbench.errors import unknown
from pflbench.published import Figure, Published
from pflbench.spec import RunSpec
from pflbench.store import schema
from pflbench.store.schema import SEEDS

from . import render
from .accuracy import Cell, short
from .frames import Runs, scores
from .metrics import METRICS

OURS = {
    ("accuracy", "last"): "deployed",
    ("own_accuracy", "last"): "own",
    ("mixed_accuracy", "last"): "mixed",
    ("accuracy", "best-test"): "deployed, best on test",
    ("own_accuracy", "best-test"): "own, best on test",
}
"""Our figures that are shown beside a published one: of the deployed models, of the clients' own models, and mixed: of
the own models of the last round's participants and the deployed models of the other clients."""
_FREE = ("algo", "hyperparameters", "eval_every", "tested", *SEEDS)
"""Settings in which the runs of a published figure may differ."""
MANY = 2.0
"""A difference of more standard deviations over seeds is stated in words."""


@dataclass(frozen=True)
class Held:
    """A published figure and ours.

    `method` is the source's name of the method, `column` names the settings of the cell. `ours` has our figures by
    metric and selection, if there are runs. `against` is the one with which the published figure is compared.
    """

    method: str
    algo: str
    column: str
    published: float
    against: tuple[str, str]
    ours: Mapping[tuple[str, str], Cell]
    runs: tuple[str, ...]

    @property
    def held(self) -> Cell | None:
        """Our figure that is compared with the published one; None without runs."""
        return self.ours.get(self.against)

    @property
    def difference(self) -> float | None:
        """Ours minus published, as a fraction; None without runs."""
        return None if self.held is None else self.held.mean - self.published

    def sentence(self) -> str | None:
        """Return in words that the difference is more than `MANY` standard deviations over seeds; None if it is not."""
        if self.held is None or self.held.std is None or self.difference is None:
            return None
        if abs(self.difference) <= MANY * self.held.std:
            return None
        by = f"{100 * abs(self.difference):.2f} points {'above' if self.difference > 0 else 'below'}"
        return (
            f"{self.method}, {self.column}: ours is {by} the published figure, more than two standard deviations over "
            f"{self.held.seeds} seeds ({100 * self.held.std:.2f} points each)."
        )


@dataclass(frozen=True)
class Reproduction:
    """The published figures of one source beside ours. `why` says, by method, against which figure it is held."""

    source: str
    rows: list[Held]
    why: dict[str, str]
    notes: list[str]

    def columns(self) -> dict[str, list[Held]]:
        """Return the figures of each column that has runs of ours."""
        labels = dict.fromkeys(row.column for row in self.rows if row.held)
        return {label: [row for row in self.rows if row.column == label] for label in labels}


def hold(runs: Runs, published: Published) -> Reproduction:
    """Return the published figures beside those of our runs of the same cells.

    A run belongs to a figure if it has the figure's method, hyperparameters and column. All other settings should be
    those of the suite. If no run has them, but all runs differ from them in the same way, these runs are used, and a
    note names the differences. Raises `UsageError` for an unknown hyperparameter.
    """
    values = {key: scores(runs, *key) for key in _keys(published)}
    of_algo = {str(algo): table for algo, table in runs.runs.groupby("algo")}
    cells = [(figure, _runs_of(of_algo.get(figure.algo, runs.runs.head(0)), figure)) for figure in published.figures]
    ways = [[_differences(row, figure, published) for _, row in found.iterrows()] for figure, found in cells]
    way, notes = _way({way for of_figure in ways for way in of_figure})
    titles = {algo: registry.title(algo) for algo in {figure.algo for figure in published.figures}}
    names = [figure.name or titles[figure.algo] for figure in published.figures]
    rows, mixed = [], []
    for name, (figure, found), of_figure in zip(names, cells, ways, strict=True):
        used = found.loc[[one == way for one in of_figure]]
        if used["algorithm_fingerprint"].nunique() > 1:
            mixed.append(name)
        known = values[figure.metric, figure.selection].reindex(used["run"]).notna().to_numpy()
        # The same seed of another source is no other seed; of two, one that has the figure is used.
        used = used.assign(known=known).sort_values("known", kind="stable").drop_duplicates([*SEEDS], keep="last")
        rows.append(_held(name, figure, published.columns, [str(run) for run in used["run"]], values))
    if mixed:
        notes.append(f"Runs of {', '.join(dict.fromkeys(mixed))} have different sources; of a seed, one is used.")
    return Reproduction(
        published.source,
        rows,
        {name: figure.why for name, figure in zip(names, published.figures, strict=True) if figure.why},
        [*notes, *_notes(rows)],
    )


def _runs_of(table: pd.DataFrame, figure: Figure) -> pd.DataFrame:
    """Return the runs of a figure's column among those of its method, with any other settings."""
    known = schema.hyperparameters(figure.algo)
    for name in figure.hyperparameters:
        if known and name not in known:
            raise unknown(f"hyperparameter of {figure.algo} in published", name, known)
    defaults = {name: field.default for name, field in known.items()}
    wanted = {**defaults, **figure.hyperparameters}

    def belongs(row: "pd.Series[Any]") -> bool:
        return (
            all(row[name] == value for name, value in figure.where.items())
            and {**defaults, **row["hyperparameters"]} == wanted
        )

    return table.loc[[belongs(row) for _, row in table.iterrows()]]


_Way = tuple[tuple[str, Any, Any], ...]
"""How a run differs from the suite: name, value and the suite's value of each setting that differs."""


def _differences(row: "pd.Series[Any]", figure: Figure, published: Published) -> _Way:
    """Return how a run of a figure's method and column differs from the suite in its other settings."""
    spec = RunSpec.from_dict({**published.base, **figure.settings, **figure.where}).normalised()
    out = []
    for name in settings.fields(RunSpec):
        is_, want = None if pd.isna(row[name]) else row[name], getattr(spec, name)
        if name not in (*_FREE, *figure.where) and is_ != want and (name, want) != ("dataset", "auto"):
            out.append((name, is_, want))
    return tuple(out)


def _way(found: set[_Way]) -> tuple[_Way | None, list[str]]:
    """Return the differences of the runs to use, and notes on them."""
    if () in found or not found:
        return (), []
    if len(found) > 1:
        names = dict.fromkeys(name for way in found for name, *_ in way)
        varying = [n for n in names if len({next((v for m, v, _ in way if m == n), None) for way in found}) > 1]
        differ = ", ".join(sorted(varying))
        return None, [f"No run has the suite's settings, and the runs differ in {differ}: choose with --where."]
    (only,) = found
    words = [f"{name.replace('_', ' ')} is {is_} instead of {want}" for name, is_, want in only]
    return only, [f"These runs do not have the suite's settings: {'; '.join(words)}."]


def _keys(published: Published) -> list[tuple[str, str]]:
    """Return the metrics and selections of our figures."""
    keys = dict.fromkeys(OURS)
    for figure in published.figures:
        keys[figure.metric, figure.selection] = None
        if (worst := f"{figure.metric}_worst10") in METRICS:
            keys[worst, figure.selection] = None
    return list(keys)


def _held(
    name: str,
    figure: Figure,
    columns: Iterable[str],
    runs: list[str],
    values: Mapping[tuple[str, str], "pd.Series[float]"],
) -> Held:
    return Held(
        method=name,
        algo=figure.algo,
        column=", ".join(short(column, figure.where[column]) for column in columns),
        published=figure.value,
        against=(figure.metric, figure.selection),
        ours={key: cell for key, of_runs in values.items() if (cell := Cell.of(of_runs.reindex(runs)))},
        runs=tuple(runs),
    )


def _notes(rows: list[Held]) -> list[str]:
    out = []
    if {row.held.seeds for row in rows if row.held} == {1}:
        out.append("Ours is one seed, without a standard deviation: differences may be chance.")
    methods = registry.algorithms()
    if strange := dict.fromkeys(row.algo for row in rows if row.algo not in methods):
        out.append(f"pflbench has no method {', '.join(strange)}.")
    if missing := sum(row.held is None for row in rows):
        out.append(f"{missing} of {len(rows)} published figures have no run of ours.")
    return [*out, *(text for row in rows if (text := row.sentence()))]


def lines(rows: Sequence[Held]) -> list[dict[str, str | None]]:
    """Return published figures and ours in percent, by the heads of a table; what has no run is None.

    Figures of ours that no row has are left out.
    """
    shown = [key for key in OURS if any(key in row.ours for row in rows)]
    return [
        {
            "method": row.method, "setting": row.column, "published": f"{100 * row.published:.2f}",
            **{OURS[key]: row.ours[key].text() if key in row.ours else None for key in shown},
            "held against": _name_of(row.against),
            "difference": None if row.difference is None else _signed(100 * row.difference),
        }
        for row in rows
    ]  # fmt: skip


def _signed(points: float) -> str:
    return f"{points:+.2f}" if abs(points) >= 0.005 else "0.00"


def _name_of(key: tuple[str, str]) -> str:
    """Return the name of one of our figures, a metric and a selection."""
    return OURS.get(key, ", ".join(key))


def grid(rows: Sequence[Held]) -> str:
    """Return published figures and ours as a Markdown table."""
    found = lines(rows)
    return render.grid(list(found[0]), [[value or "missing" for value in line.values()] for line in found], left=2)


def markdown(found: Reproduction) -> str:
    """Return the comparison as Markdown."""
    notes = "".join(f"- {note}\n" for note in found.notes)
    why = "".join(f"- {name}: {' '.join(text.split())}\n" for name, text in found.why.items())
    return f"Accuracy in percent, beside the figures of {found.source}.\n\n{grid(found.rows)}\n\n{notes}\n{why}"


def csv_text(found: Reproduction) -> str:
    """Return the comparison as CSV. Accuracies are fractions; an empty cell has no run."""
    rows = []
    for row in found.rows:
        line: dict[str, Any] = {"source": found.source, "method": row.method, "algo": row.algo, "setting": row.column,
                                "published": round(row.published, 6)}  # fmt: skip
        for key, name in OURS.items():
            own = row.ours.get(key)
            line |= {name: own and own.mean, f"{name}, std": own and own.std}
        line |= {"held against": _name_of(row.against), "difference": row.difference,
                 "seeds": row.held.seeds if row.held else 0, "runs": " ".join(row.runs)}  # fmt: skip
        rows.append(line)
    return render.csv_of(rows)
