"""The report on runs: its contents, and the files of its folder."""

import base64
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from pflbench import files
from pflbench.errors import UsageError
from pflbench.published import Published

from . import dots, partition_plot, plots, published, stats
from .accuracy import AccuracyTable, Comparisons, Duels, accuracy_tables, duels
from .frames import Runs, client_scores, in_order, scores
from .published import Held, Reproduction, hold
from .render import csv_text, heading, latex, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHARE = 0.9


@dataclass(frozen=True)
class Report:
    """The contents of a report. `ranks` and `duels` are by protocol: nothing is averaged over protocols."""

    runs: Runs
    metric: str
    selection: str
    tables: list[AccuracyTable]
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
    tests = Comparisons(runs, metric, selection)
    found = accuracy_tables(runs, metric, selection, tests)
    ranks = {table.protocol: _ranks(table) for table in found}
    wins = {table.protocol: duels(table, tests) for table in found}
    held = [hold(runs, one) for one in published]
    return Report(runs, metric, selection, found, ranks, wins, held, _targets(runs, target))


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
            why = f"This is {share} of the best method's accuracy after the last round. --target sets another."
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


def write(report: Report, out: Path, *, workers: int = 1) -> list[Path]:
    """Write the report to folder `out`, replace an older report there, and return the main files.

    report.html holds everything. The tables are in accuracy.md, accuracy.tex and accuracy.csv (accuracy-<protocol>.md
    and .tex where there are several protocols), the plots in plots/.
    Raises `UsageError` when `out` contains something other than a report.
    """
    if out.exists() and not (out.is_dir() and ((out / "report.html").exists() or not any(out.iterdir()))):
        raise UsageError(f"out: {out} exists and is no report; choose another --out")
    with files.scratch(out) as folder:
        made = folder / "made"
        (made / "plots").mkdir(parents=True)
        jobs = _plots(report)
        if workers > 1 and len(jobs) > workers:
            with ProcessPoolExecutor(workers) as pool:
                list(pool.map(_draw, *zip(*((job, made / "plots") for job in jobs), strict=True)))
        else:
            for job in jobs:
                _draw(job, made / "plots")
        for table in report.tables:
            stem = "accuracy" if len(report.tables) == 1 else f"accuracy-{table.protocol}"
            (made / f"{stem}.md").write_text(markdown(table), encoding="utf-8")
            (made / f"{stem}.tex").write_text(latex(table), encoding="utf-8")
        (made / "accuracy.csv").write_text(csv_text(report.tables), encoding="utf-8")
        for i, held in enumerate(report.published):
            stem = "published" if len(report.published) == 1 else f"published-{i}"
            (made / f"{stem}.md").write_text(published.markdown(held), encoding="utf-8")
            (made / f"{stem}.csv").write_text(published.csv_text(held), encoding="utf-8")
        (made / "report.html").write_text(html(report, made / "plots"), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        files.place(made, out)
    return sorted(path for path in out.iterdir() if path.is_file())


Job = tuple[str, Callable[..., Any], tuple[Any, ...]]
"""The name of a plot, the function that draws it, and its arguments."""


def _plots(report: Report) -> list[Job]:
    runs = report.runs
    style = plots.styles(in_order(runs.runs["method"].unique()))
    curves = plots.curves(runs)
    metric = "global_accuracy" if report.metric == "global_accuracy" else "accuracy"
    of_clients = client_scores(runs, metric, report.selection)
    jobs: list[Job] = []
    for table in report.tables:
        for setting, labels in table.columns.items():
            rows = runs.runs[runs.runs["setting"] == setting]
            title = ", ".join(labels)
            # The seconds in records of schema 1 contain the evaluations, so a plot of such a record must say so.
            time = "seconds of training" if (rows["schema"] > 1).all() else "seconds, with evaluations in some runs"
            lines = curves[curves["setting"] == setting]
            jobs.append((f"learning-{setting}", plots.learning, (lines, style, title, time)))
            values = {
                method: of_clients.loc[list(rows.loc[rows["method"] == method, "run"])].to_numpy(float).ravel()
                for method in in_order(rows["method"].unique())
            }
            jobs.append((f"clients-{setting}", plots.clients, (values, style, title)))
            first = rows.sort_values("seed").iloc[0]
            jobs.append((f"partition-{setting}", _partition, (Path(first["path"]), f"{title}, seed {first['seed']}")))
        for factor in plots.FACTORS:
            for i, (others, points) in enumerate(_against(report, table, factor).items()):
                jobs.append((f"{factor}-{table.protocol}-{i}", plots.against, (points, style, others, factor)))
        ranks = report.ranks[table.protocol]
        if isinstance(ranks, stats.Ranks):
            title = f"average ranks over {ranks.settings} settings"
            jobs.append((f"ranks-{table.protocol}", plots.critical_difference, (ranks, stats.cliques(ranks), title)))
    for i, held in enumerate(report.published):
        for j, (column, of_column) in enumerate(held.columns().items()):
            looks = {row.method: _look(row, runs, style) for row in of_column}
            jobs.append((f"published-{i}-{j}", dots.figure, (of_column, looks, column)))
    return jobs


def _look(row: Held, runs: Runs, style: dict[str, plots.Style]) -> plots.Style:
    """Return the look of a method of a published table: that of its runs, grey without runs."""
    methods = runs.runs.loc[runs.runs["run"].isin(row.runs), "method"]
    return style[methods.iloc[0]] if len(methods) else plots.Style("#8a8f96", "-", "o")


def _draw(job: Job, folder: Path) -> None:
    name, figure, arguments = job
    plots.save(figure(*arguments), folder, name)


def _partition(run: Path, title: str) -> "Figure":
    samples = pq.read_table(run / "samples.parquet").to_pandas()
    counts = np.zeros((samples["client"].max() + 1, samples["class"].max() + 1), dtype=np.int64)
    counts[samples["client"], samples["class"]] = samples["train"] + samples["test"]
    names = [str(i) for i in range(counts.shape[1])]
    return partition_plot.figure(counts, names, title)


def _against(report: Report, table: AccuracyTable, factor: str) -> dict[str, pd.DataFrame]:
    """Return method, `factor`, mean and std of a table's settings, by the labels of the settings in all else.

    Settings that differ in nothing but the factor, an "alpha" or a "join_ratio", are one entry; it has two or more.
    """
    settings = report.runs.settings()
    level = "partition" if factor == "alpha" else factor
    points: dict[str, list[dict[str, Any]]] = {}
    for (method, setting), cell in table.cells.items():
        row = settings.loc[setting]
        if level in table.levels and (factor != "alpha" or row["partition"] == "dirichlet"):
            labels = zip(table.levels, table.columns[setting], strict=True)
            others = ", ".join(label for name, label in labels if name != level)
            line = {"method": method, factor: float(str(row[factor])), "mean": cell.mean, "std": cell.std}
            points.setdefault(others, []).append(line)
    found = {others: pd.DataFrame(lines).astype({"std": float}) for others, lines in points.items()}
    return {others: lines for others, lines in found.items() if lines[factor].nunique() > 1}


def html(report: Report, folder: Path) -> str:
    """Return the report as one page that needs no other file. `folder` has the plots."""
    import jinja2

    runs = report.runs
    loader = jinja2.PackageLoader("pflbench.reports", ".")
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "page.html.j2"
    )
    labels = {s: ", ".join(label) for table in report.tables for s, label in table.columns.items()}
    titles = {s: table.title for table in report.tables for s in table.columns}
    settings = [
        {
            "number": setting, "label": labels[setting], "protocol": titles[setting], "target": wanted,
            "target_text": why, "to_target": found.to_dict("records"),
        }
        for setting, (wanted, why, found) in report.targets.items()
    ]  # fmt: skip
    values = scores(runs, report.metric, report.selection)
    alphas: dict[int, list[tuple[str, str]]] = {}
    for factor, (name, _) in plots.FACTORS.items():
        for path in sorted(folder.glob(f"{factor}-*.png")):
            alphas.setdefault(int(path.stem.split("-")[1]), []).append((path.stem, f"accuracy against {name}"))
    return page.render(
        runs=[_run(row, labels, float(values[row["run"]])) for _, row in runs.runs.iterrows()],
        methods=in_order(runs.runs["method"].unique()),
        tables=report.tables,
        heading=heading,
        settings=settings,
        ranks=report.ranks,
        duels=report.duels,
        alphas=alphas,
        images={path.stem: base64.b64encode(path.read_bytes()).decode() for path in folder.glob("*.png")},
        left_out=list(runs.left_out.itertuples(index=False, name=None)),
        published=[(held, published.lines(held), list(held.columns())) for held in report.published],
    )


def _run(row: "pd.Series[Any]", labels: dict[int, str], score: float) -> dict[str, Any]:
    derived = {"run", "method", "setting", "protocol"}
    fields = [(k, v) for k, v in row.items() if k not in derived and not (v is None or v != v)]  # NaN
    return {"run": row["run"], "method": row["method"], "label": labels[row["setting"]], "seed": row["seed"],
            "score": score, "fields": fields}  # fmt: skip
