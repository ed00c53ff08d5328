"""`pflbench partition`: a partition as a table, a picture and sample numbers, without training."""

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pflbench import files
from pflbench.cli import options
from pflbench.spec import RunSpec

if TYPE_CHECKING:
    import rich.table

    from pflbench.datasets.dataset import Dataset
    from pflbench.datasets.partitioners import Ints, Partition

_SETTINGS = (
    "dataset", "split", "partition", "alpha", "classes_per_client", "balanced", "min_samples", "clients", "seed",
    "partition_seed",
)  # fmt: skip
_MOST = 20  # with up to so many classes, each class has a column on a terminal


@click.command("partition")
@options.spec(_SETTINGS)
@options.config
@options.data_dir
@options.out("partitions", "the pictures and numbers")
@options.as_json
def command(config: str | None, data_dir: str | None, out: str, as_json: bool, **given: Any) -> None:
    """Show and draw which client gets which samples, without training.

    Writes partition.png, partition.svg, counts.csv and the sample numbers, indices.npz, to FOLDER/<fingerprints of
    partition and dataset>/. If that folder exists, it has the same contents, and is not written again.
    """
    from pflbench import datasets
    from pflbench.datasets.partitioners import make

    values = options.read(config, {**given, "data_dir": data_dir})
    data_folder = options.data_folder(values.get("data_dir")) or datasets.default_data_dir()
    folder = options.folder("out", out)
    # The default join ratio needs 6 clients. It is not used here.
    settings = {name: value for name, value in values.items() if name in _SETTINGS}
    spec = RunSpec.from_dict({**settings, "join_ratio": 1.0}).normalised()
    files.check_out(folder)
    data = datasets.load(datasets.resolve(spec.dataset, data_folder, notice=options.notice), data_folder)
    parts = make(data.labels, data.n_train, len(data.classes), **spec.partition_settings())
    counts = parts.counts(data.labels, len(data.classes))
    title = f"{data.name}: {spec.describe_partition()}, seed {spec.seed_of('partition')}"
    path = _write(folder, title, data, parts, counts)
    if as_json:
        found = {"fingerprint": parts.fingerprint, "path": str(path), "moved": parts.moved, "counts": counts.tolist()}
        click.echo(json.dumps({"dataset": data.name, "classes": list(data.classes), **found}))
        return
    from pflbench.cli.display import console

    shown = console()
    shown.print(_table(title, counts, data.classes))
    if parts.moved:
        shown.print(f"{parts.moved} samples were moved so that every client has at least {spec.min_samples}")
    shown.print(f"partition {parts.fingerprint[:12]}: {path}", highlight=False, soft_wrap=True)


def _write(out: Path, title: str, data: "Dataset", parts: "Partition", counts: "Ints") -> Path:
    """Write the folder of the partition below `out` unless it exists; return it."""
    import numpy as np

    from pflbench.reports.partition_plot import draw

    path = out / f"{parts.fingerprint[:12]}-{data.fingerprint[:8]}"
    if path.exists():
        return path
    with files.scratch(path) as folder:
        made = folder / "made"
        made.mkdir()
        draw(counts, data.classes, title, [made / "partition.png", made / "partition.svg"])
        with (made / "counts.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["client", *data.classes], *([i, *row] for i, row in enumerate(counts))])
        arrays: dict[str, Any] = {f"train_{i}": rows for i, rows in enumerate(parts.train)}
        arrays |= {f"test_{i}": rows for i, rows in enumerate(parts.test)}
        np.savez_compressed(made / "indices.npz", **arrays)
        files.place(made, path)
    return path


def _table(title: str, counts: "Ints", classes: tuple[str, ...]) -> "rich.table.Table":
    import rich.box
    from rich.table import Table

    out = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column("client", justify="right")
    out.add_column("samples", justify="right")
    out.add_column("classes", justify="right")
    columns = range(len(classes)) if len(classes) <= _MOST else range(0)
    for i in columns:
        out.add_column(classes[i][:5], justify="right")
    for client, row in enumerate(counts):
        cells = [str(row[i]) if row[i] else "." for i in columns]
        out.add_row(str(client), str(row.sum()), str((row > 0).sum()), *cells)
    return out
