"""The `partition` command: a table, a picture and the sample numbers, without training."""

import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table

from pflbench import datasets
from pflbench.datasets.partitioners import make
from pflbench.reports.partition_plot import draw
from pflbench.spec import RunSpec
from pflbench.store.record import check_out

_MOST = 20  # classes that a terminal shows one by one


def show(spec: RunSpec, out: Path, data_dir: Path | None, notice: Callable[[str], None], *, as_json: bool) -> None:
    """Print who has how many samples of each class, and write `out/<hash of the partition>-<hash of the dataset>/`.

    A folder that is there already has the same contents and is left alone. Raises `UsageError` when the partition is
    impossible or `out` cannot be written.
    """
    check_out(out)
    folder = data_dir or datasets.default_data_dir()
    spec = spec.normalised()
    data = datasets.load(datasets.resolve(spec.dataset, folder, notice=notice), folder)
    parts = make(data.labels, data.n_train, len(data.classes), **spec.partition_settings())
    counts = parts.counts(data.labels, len(data.classes))
    path = out / f"{parts.fingerprint[:12]}-{data.fingerprint[:8]}"
    title = f"{data.name}: {spec.describe_partition()}, seed {spec.seed_of('partition')}"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as name:
            made = Path(name) / "made"
            made.mkdir()
            draw(counts, data.classes, title, [made / "partition.png", made / "partition.svg"])
            with (made / "counts.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([["client", *data.classes], *([i, *row] for i, row in enumerate(counts))])
            arrays: dict[str, Any] = {f"train_{i}": rows for i, rows in enumerate(parts.train)}
            arrays |= {f"test_{i}": rows for i, rows in enumerate(parts.test)}
            np.savez_compressed(made / "indices.npz", **arrays)
            try:
                made.rename(path)
            except OSError:  # another process was faster; its contents are the same
                if not path.is_dir():
                    raise
    if as_json:
        found = {"fingerprint": parts.fingerprint, "path": str(path), "moved": parts.moved, "counts": counts.tolist()}
        click.echo(json.dumps({"dataset": data.name, "classes": list(data.classes), **found}))
        return
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(_table(title, counts, data.classes))
    if parts.moved:
        console.print(f"{parts.moved} samples were moved so that every client has at least {spec.min_samples}")
    console.print(f"partition {parts.fingerprint[:12]}: {path}", highlight=False, soft_wrap=True)


def _table(title: str, counts: "np.ndarray[Any, np.dtype[np.int64]]", classes: tuple[str, ...]) -> Table:
    out = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column("client", justify="right")
    out.add_column("samples", justify="right")
    out.add_column("classes", justify="right")
    shown = range(len(classes)) if len(classes) <= _MOST else range(0)
    for i in shown:
        out.add_column(classes[i][:5], justify="right")
    for client, row in enumerate(counts):
        cells = [str(row[i]) if row[i] else "." for i in shown]
        out.add_row(str(client), str(row.sum()), str((row > 0).sum()), *cells)
    return out
