"""The plots of a report: which there are, and their files and their elements of the page."""

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from . import dots, partition_plot, plots, stats, svg
from .accuracy import PER_CLIENT, AccuracyTable
from .contents import Report
from .frames import Runs, client_scores, in_order
from .metrics import tested
from .published import Held

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Job:
    """One plot: the `name` of its files, its `title`, the function that draws it, and the arguments of that function.

    `panels` has the plots that stand for it on the page, by name, each with more arguments; without any, the plot
    itself does.
    """

    name: str
    title: str
    function: "Callable[..., Figure]"
    arguments: tuple[Any, ...]
    panels: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def draw_all(report: Report, folder: Path, *, workers: int) -> dict[str, str]:
    """Write all plots of `report` to `folder`, as PNG and PDF; return their elements of the page by name."""
    todo = jobs(report)
    if workers > 1 and len(todo) > workers:
        with ProcessPoolExecutor(workers) as pool:
            drawn = list(pool.map(_draw, todo, [folder] * len(todo)))
    else:
        drawn = [_draw(job, folder) for job in todo]
    return {name: element for elements in drawn for name, element in elements.items()}


def _draw(job: Job, folder: Path) -> dict[str, str]:
    figure = job.function(*job.arguments)
    plots.save(figure, folder, job.name)
    panels = {name: job.function(*job.arguments, **more) for name, more in job.panels.items()} or {job.name: figure}
    return {name: svg.inline(panel, name, job.title) for name, panel in panels.items()}


def jobs(report: Report) -> list[Job]:
    """Return the plots of `report`."""
    runs = report.runs
    style = report.look
    curves = plots.curves(runs)
    of_clients = client_scores(runs, PER_CLIENT.get(report.metric, tested(report.metric)), report.selection)
    of_clients = of_clients.reindex(runs.runs["run"])
    out: list[Job] = []
    for table in report.tables:
        for setting, labels in table.columns.items():
            rows = runs.runs[runs.runs["setting"] == setting]
            title = ", ".join(labels)
            # The seconds in records of schema 1 contain the evaluations, so a plot of such a record must say so.
            time = "seconds of training" if (rows["schema"] > 1).all() else "seconds, with evaluations in some runs"
            lines = curves[curves["setting"] == setting]
            panels = {f"learning-{setting}-{cost}": {"costs": (cost,)} for cost in plots.COSTS}
            name = f"accuracy against rounds, megabytes and seconds, {title}"
            out.append(Job(f"learning-{setting}", name, plots.learning, (lines, style, title, time), panels))
            values = {
                method: of_clients.loc[list(rows.loc[rows["method"] == method, "run"])].to_numpy(float).ravel()
                for method in in_order(rows["method"].unique())
            }
            name = f"accuracies of the clients, {title}"
            out.append(Job(f"clients-{setting}", name, plots.clients, (values, style, title)))
            first = rows.sort_values("seed").iloc[0]
            name = f"samples of each class at each client, {title}"
            of_seed = f"{title}, seed {first['seed']}"
            out.append(Job(f"partition-{setting}", name, _partition, (Path(first["path"]), of_seed)))
        for factor, (words, _) in plots.FACTORS.items():
            for i, (others, points) in enumerate(_against(report, table, factor)):
                name = f"{factor}-{table.protocol}-{i}"
                title = f"accuracy against {words}, {others}"
                alone = {f"{name}-panel": {"alone": True}}
                out.append(Job(name, title, plots.against, (points, style, others, factor), alone))
        ranks = report.ranks[table.protocol]
        if isinstance(ranks, stats.Ranks):
            title = f"average ranks over {ranks.settings} settings"
            arguments = (ranks, stats.cliques(ranks), title)
            out.append(Job(f"ranks-{table.protocol}", title, plots.critical_difference, arguments))
    for i, held in enumerate(report.published):
        for j, (column, of_column) in enumerate(held.columns().items()):
            looks = {row.method: _look(row, runs, style) for row in of_column}
            title = f"published figures and ours, {column}"
            out.append(Job(f"published-{i}-{j}", title, dots.figure, (of_column, looks, column)))
    return out


def _look(row: Held, runs: Runs, style: Mapping[str, plots.Style]) -> plots.Style:
    """Return the look of a method of a published table: that of its runs, grey without runs."""
    methods = runs.runs.loc[runs.runs["run"].isin(row.runs), "method"]
    return style[methods.iloc[0]] if len(methods) else plots.Style("#868e96")


def _partition(run: Path, title: str) -> "Figure":
    samples = pq.read_table(run / "samples.parquet").to_pandas()
    counts = np.zeros((samples["client"].max() + 1, samples["class"].max() + 1), dtype=np.int64)
    counts[samples["client"], samples["class"]] = samples["train"] + samples["test"]
    names = [str(i) for i in range(counts.shape[1])]
    return partition_plot.figure(counts, names, title)


def _against(report: Report, table: AccuracyTable, factor: str) -> list[tuple[str, pd.DataFrame]]:
    """Return the lines of a table against `factor`, "alpha" or "join_ratio": method, factor, mean and std.

    Settings that differ in nothing but the factor are one entry, under the labels of all else; it has two or more.
    """
    settings = report.runs.settings()
    data = report.runs.runs.groupby("setting")["data_fingerprint"].first()
    level = "partition" if factor == "alpha" else factor
    points: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    titles: dict[tuple[str, ...], str] = {}
    for (method, setting), cell in table.cells.items():
        row = settings.loc[setting]
        if level in table.levels and (factor != "alpha" or row["partition"] == "dirichlet"):
            labels = zip(table.levels, table.columns[setting], strict=True)
            others = tuple(str(value) for name, value in row.items() if name != factor)
            key = (*others, data[setting])
            titles[key] = ", ".join(label for name, label in labels if name != level)
            line = {"method": method, factor: float(str(row[factor])), "mean": cell.mean, "std": cell.std}
            points.setdefault(key, []).append(line)
    found = [(titles[key], pd.DataFrame(lines).astype({"std": float})) for key, lines in points.items()]
    return [(others, lines) for others, lines in found if lines[factor].nunique() > 1]
