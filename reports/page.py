"""The report as one page that needs no other file."""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import pandas as pd

from . import plots, published
from .accuracy import plain
from .contents import Report
from .frames import Runs, in_order, scores
from .render import heading

_SHORT = {
    "accuracy": "accuracy", "accuracy_mean": "mean of clients", "accuracy_worst10": "worst 10 %",
    "accuracy_std": "deviation over clients", "global_accuracy": "global model",
}  # fmt: skip
_MODELS = {"own": "own models", "mixed": "participants' own, others' deployed"}
_SECONDS = ("seconds", "evaluation_seconds")


def html(report: Report, elements: Mapping[str, str], *, title: str, date: str | None) -> str:
    """Return the page. `elements` has the plots; `title` stands above it, and `date`, if given, below the title."""
    import jinja2

    runs = report.runs
    loader = jinja2.PackageLoader("pflbench.reports", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    labels = {s: ", ".join(label) for table in report.tables for s, label in table.columns.items()}
    protocols = {s: table.title for table in report.tables for s in table.columns}
    settings = [
        {
            "number": setting, "label": labels[setting], "protocol": protocols[setting], "target": wanted,
            "target_text": why, "to_target": found.to_dict("records"),
        }
        for setting, (wanted, why, found) in report.targets.items()
    ]  # fmt: skip
    values = scores(runs, report.metric, report.selection)
    return environment.get_template("page.html.j2").render(
        title=title,
        date=date,
        version=importlib.metadata.version("pflbench"),
        metric=report.metric,
        metrics={name: short(name) for name in report.every},
        every=report.every,
        tables=report.tables,
        leaders=report.leaders,
        heading=heading,
        runs=[_run(row, labels, float(values[row["run"]])) for _, row in runs.runs.iterrows()],
        methods=_methods(runs),
        look=report.look,
        settings=settings,
        ranks=report.ranks,
        duels=report.duels,
        against=_against(elements),
        costs=plots.COSTS,
        elements=elements,
        left_out=list(runs.left_out.itertuples(index=False, name=None)),
        published=[(held, _linked(held), list(held.columns())) for held in report.published],
    )


def _linked(held: published.Reproduction) -> list[tuple[published.Held, dict[str, str | None]]]:
    """Return the figures that have runs of ours, each with its line of the table."""
    rows = [row for row in held.rows if row.held]
    return list(zip(rows, published.lines(rows), strict=True))


def short(metric: str) -> str:
    """Return a few words for a metric."""
    kind, _, name = metric.partition("_")
    if kind in _MODELS:
        return f"{_MODELS[kind]}: {_SHORT[name]}"
    return _SHORT[metric]


def _against(elements: Mapping[str, str]) -> dict[int, list[str]]:
    """Return the names of the plots of accuracy against a factor, by protocol."""
    out: dict[int, list[str]] = {}
    for name in elements:
        factor, _, rest = name.partition("-")
        if factor in plots.FACTORS:
            out.setdefault(int(rest.partition("-")[0]), []).append(name)
    return out


def _methods(runs: Runs) -> list[dict[str, Any]]:
    """Return for each method its hyperparameters, its numbers of runs and seeds, and how many clients took part."""
    took_part = runs.rounds.groupby("run")["participants"].agg(lambda lists: len({c for one in lists for c in one}))
    out = []
    for method in in_order(runs.runs["method"].unique()):
        rows = runs.runs[runs.runs["method"] == method]
        parts = [
            f"{took_part.get(run, 0)} of {clients}" for run, clients in zip(rows["run"], rows["clients"], strict=True)
        ]
        found = sorted({*parts}, key=lambda text: int(text.split()[0]))
        low, high = found[0].split()[0], found[-1]
        out.append(
            {
                "method": method,
                "hyperparameters": _assignments(rows["hyperparameters"].iloc[0]) or "none",
                "runs": len(rows),
                "seeds": rows["seed"].nunique(),
                "took_part": high if len(found) == 1 else f"{low} to {high}",
            }
        )
    return out


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_text(value)}" for name, value in values.items())


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else plain(value)


def _run(row: "pd.Series[Any]", labels: Mapping[int, str], score: float) -> dict[str, Any]:
    derived = {"run", "method", "setting", "protocol"}
    fields = [(str(k), _shown(str(k), v)) for k, v in row.items() if k not in derived and not (v is None or v != v)]
    return {"run": row["run"], "method": row["method"], "label": labels[row["setting"]], "seed": row["seed"],
            "score": score, "fields": fields}  # fmt: skip


def _shown(name: str, value: Any) -> str:
    """Return a field of a run as a reader wants it: seconds, megabytes, hyperparameters as name=value."""
    if name == "hyperparameters":
        return _assignments(value) or "none"
    if name in _SECONDS:
        return f"{value:,.1f} s"
    return f"{value / 1e6:,.1f} MB" if name.startswith("bytes_") else _text(value)
