"""Write the tables of docs/results/fedas.md from the records beside it: `python tests/results.py`."""

import re
import tarfile
import tempfile
from pathlib import Path

from pflbench.cli.sweep import read_suite
from pflbench.reports import load, render, scores
from pflbench.reports.frames import Runs
from pflbench.reports.published import grid, hold

FOLDER = Path(__file__).parents[1] / "docs" / "results"
PAGE = FOLDER / "fedas.md"
SUITES = {"fedas-table2": "cifar100"}  # with the dataset of its runs
_PLACE = re.compile(r"(<!-- tables: python tests/results.py -->\n).*?(<!-- end of tables -->)", re.DOTALL)


def records(folder: Path) -> Path:
    """Unpack the records into `folder`; return the folder of the runs."""
    with tarfile.open(FOLDER / "fedas.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "fedas"


def table(runs: Runs, suite: str) -> str:
    """Return the cells of a suite that have runs, as Markdown."""
    published = read_suite(suite).published
    assert published is not None
    found = hold(runs, published)
    text = grid([row for row in found.rows if row.held])
    notes = "".join(f"- {note}\n" for note in found.notes)
    return f"**{found.source}.** Percent.\n\n{text}\n\n{notes}"


def ours(runs: Runs) -> str:
    """Return every run's figures as Markdown: all methods, also those that the paper does not have."""
    names = ["accuracy", "accuracy_worst10", "own_accuracy", "own_accuracy_worst10", "mixed_accuracy"]
    values = [scores(runs, name) for name in names]
    head = ["method", "dataset", "alpha", "P", "seed", "deployed", "worst 10 %", "own", "worst 10 %", "mixed"]
    lines = []
    for _, row in runs.runs.sort_values(["dataset", "alpha", "join_ratio", "method", "seed"]).iterrows():
        cells = [row["method"], row["dataset"], f"{row['alpha']:g}", f"{row['join_ratio']:g}", str(row["seed"])]
        lines.append([*cells, *(f"{100 * value[row['run']]:.2f}" for value in values)])
    text = render.grid(head, lines, left=2)
    return f"**All our runs.** Percent, after the last round.\n\n{text}\n"


def page(text: str) -> str:
    """Return the page with current tables."""
    with tempfile.TemporaryDirectory() as folder:
        place = records(Path(folder))
        made = "\n".join(table(load(place, where={"dataset": [data]}), suite) for suite, data in SUITES.items())
        made += "\n" + ours(load(place))
    return _PLACE.sub(lambda found: f"{found[1]}{made}{found[2]}", text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
