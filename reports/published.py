"""Published figures beside ours, cell by cell."""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pflbench import settings
from pflbench.core import registry
from pflbench.errors import unknown
from pflbench.published import Figure, Published
from pflbench.spec import RunSpec
from pflbench.store.schema import SEEDS

from .accuracy import short
from .frames import SELECTIONS, Runs, scores
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
class Ours:
    """One of our figures: its mean over seeds, a fraction, and the standard deviation (None for one seed)."""

    mean: float
    std: float | None
    seeds: int

    def text(self) -> str:
        """Return mean and standard deviation in percent."""
        return f"{100 * self.mean:.2f}" + ("" if self.std is None else f" ± {100 * self.std:.2f}")


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
    ours: Mapping[tuple[str, str], Ours]
    runs: tuple[str, ...]

    @property
    def held(self) -> Ours | None:
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
    those of the suite. If no run has them, but all runs agree in other ones, these runs are used, and a note names the
    differences.
    """
    names = [n for n in settings.fields(RunSpec) if n not in (*_FREE, *published.columns)]
    cells = [(figure, _runs_of(runs.runs, figure)) for figure in published.figures]
    protocol, notes = _protocol(published, names, {p for _, found in cells for p in _protocols(found, names)})
    values = {key: scores(runs, *key) for key in _keys(published)}
    rows, mixed = [], []
    for figure, found in cells:
        used = found.loc[[p == protocol for p in _protocols(found, names)]]
        if used["algorithm_fingerprint"].nunique() > 1:
            mixed.append(_name(figure))
        used = used.drop_duplicates([*SEEDS], keep="last")  # the same seed of another source is no other seed
        rows.append(_held(figure, published.columns, [str(run) for run in used["run"]], values))
    if mixed:
        notes.append(f"Runs of {', '.join(dict.fromkeys(mixed))} have different sources; of a seed, one is used.")
    return Reproduction(
        published.source,
        rows,
        {_name(figure): figure.why for figure in published.figures if figure.why},
        [*notes, *_notes(rows)],
    )


def _name(figure: Figure) -> str:
    return figure.name or registry.title(figure.algo)


def _runs_of(table: pd.DataFrame, figure: Figure) -> pd.DataFrame:
    """Return the runs of a figure's method and column, with any other settings."""
    known = registry.describe(figure.algo).hyperparameters if figure.algo in registry.algorithms() else {}
    wanted = {name: field.default for name, field in known.items()} | dict(figure.hyperparameters)

    def belongs(row: "pd.Series[Any]") -> bool:
        return (
            row["algo"] == figure.algo
            and all(row[name] == value for name, value in figure.where.items())
            and {name: row["hyperparameters"].get(name, value) for name, value in wanted.items()} == wanted
        )

    return table[[belongs(row) for _, row in table.iterrows()]]


def _protocols(table: pd.DataFrame, names: list[str]) -> list[tuple[Any, ...]]:
    """Return the values of the settings `names` of each run."""
    return [tuple(None if pd.isna(value) else value for value in row) for row in table[names].itertuples(index=False)]


def _protocol(
    published: Published, names: list[str], found: set[tuple[Any, ...]]
) -> tuple[tuple[Any, ...] | None, list[str]]:
    """Return the values of the settings `names` of the runs to use, and notes on how they differ from the suite's."""
    first = published.figures[0].where if published.figures else {}
    spec = RunSpec.from_dict({**{n: v for n, v in published.base.items() if n != "set"}, **first}).normalised()
    wanted = tuple(getattr(spec, name) for name in names)
    if wanted in found or not found:
        return wanted, []
    if len(found) > 1:
        varying = [n for n, *values in zip(names, *found, strict=True) if len(set(values)) > 1]
        text = f"No run has the suite's settings, and the runs differ in {', '.join(varying)}: choose with --where."
        return None, [text]
    (only,) = found
    differences = [
        f"{name.replace('_', ' ')} is {is_} instead of {want}"
        for name, is_, want in zip(names, only, wanted, strict=True)
        if is_ != want
    ]
    return only, [f"These runs do not have the suite's settings: {'; '.join(differences)}."]


def _keys(published: Published) -> list[tuple[str, str]]:
    """Return the metrics and selections of our figures. Raises `UsageError` for an unknown name."""
    keys = dict.fromkeys(OURS)
    for figure in published.figures:
        for what, name, known in (("metric", figure.metric, METRICS), ("selection", figure.selection, SELECTIONS)):
            if name not in known:
                raise unknown(f"{what} in published", name, known)
        keys[figure.metric, figure.selection] = None
        if (worst := f"{figure.metric}_worst10") in METRICS:
            keys[worst, figure.selection] = None
    return list(keys)


def _held(
    figure: Figure, columns: Iterable[str], runs: list[str], values: Mapping[tuple[str, str], "pd.Series[float]"]
) -> Held:
    ours = {}
    for key, of_runs in values.items():
        found = of_runs.reindex(runs).dropna()
        if len(found):
            std = float(found.std(ddof=1)) if len(found) > 1 else None
            ours[key] = Ours(float(found.mean()), std, len(found))
    return Held(
        method=_name(figure),
        algo=figure.algo,
        column=", ".join(short(name, figure.where[name]) for name in columns),
        published=figure.value,
        against=(figure.metric, figure.selection),
        ours=ours,
        runs=tuple(runs),
    )


def _notes(rows: list[Held]) -> list[str]:
    out = []
    if {row.held.seeds for row in rows if row.held} == {1}:
        out.append("Ours is one seed, without a standard deviation: differences may be chance.")
    if missing := sum(row.held is None for row in rows):
        out.append(f"{missing} of {len(rows)} published figures have no run of ours.")
    return [*out, *(text for row in rows if (text := row.sentence()))]


def lines(found: Reproduction) -> list[dict[str, Any]]:
    """Return a row for each published figure, with our figures in percent; a figure without runs is None."""
    shown = [key for key in OURS if any(key in row.ours for row in found.rows)]
    return [
        {
            "method": row.method, "setting": row.column, "published": f"{100 * row.published:.2f}",
            **{OURS[key]: row.ours[key].text() if key in row.ours else None for key in shown},
            "held against": name_of(row.against),
            "difference": None if row.difference is None else f"{100 * row.difference:+.2f}",
        }
        for row in found.rows
    ]  # fmt: skip


def name_of(key: tuple[str, str]) -> str:
    """Return the name of one of our figures, a metric and a selection."""
    return OURS.get(key, ", ".join(key))


def markdown(found: Reproduction) -> str:
    """Return the comparison as Markdown."""
    rows = lines(found)
    table = [list(rows[0]), ["---", "---", *("---:" for _ in list(rows[0])[2:])]]
    table += [["missing" if value is None else str(value) for value in row.values()] for row in rows]
    text = "\n".join(f"| {' | '.join(part.replace('|', '/') for part in line)} |" for line in table)
    notes = "".join(f"- {note}\n" for note in found.notes)
    why = "".join(f"- {name}: {' '.join(text.split())}\n" for name, text in found.why.items())
    return f"Accuracy in percent, beside the figures of {found.source}.\n\n{text}\n\n{notes}\n{why}"


def csv_text(found: Reproduction) -> str:
    """Return the comparison as CSV. Accuracies are fractions; an empty cell has no run."""
    rows = []
    for row in found.rows:
        line: dict[str, Any] = {"source": found.source, "method": row.method, "algo": row.algo, "setting": row.column,
                                "published": row.published}  # fmt: skip
        for key, name in OURS.items():
            own = row.ours.get(key)
            line |= {name: own and own.mean, f"{name}, std": own and own.std}
        held = row.held
        line |= {"held against": name_of(row.against), "difference": row.difference,
                 "seeds": held.seeds if held else 0, "runs": " ".join(row.runs)}  # fmt: skip
        rows.append(line)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
