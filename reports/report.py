"""The files of a report."""

import shutil
from pathlib import Path

from pflbench import files
from pflbench.errors import UsageError

from . import drawing, page, published
from .contents import Report, make
from .render import csv_text, latex, markdown

__all__ = ["Report", "make", "write"]


def write(
    report: Report, out: Path, *, workers: int = 1, title: str = "pflbench report", date: str | None = None
) -> list[Path]:
    """Write the report to folder `out`, replace an older report there, and return the main files.

    `title` stands above the page, and `date`, if given, below it.

    report.html holds everything. The tables are in accuracy.md, accuracy.tex and accuracy.csv (accuracy-<protocol>.md
    and .tex where there are several protocols), the plots in plots/.
    Raises `UsageError` when `out` contains something other than a report.
    """
    if out.exists() and not (out.is_dir() and ((out / "report.html").exists() or not any(out.iterdir()))):
        raise UsageError(f"out: {out} exists and is no report; choose another --out")
    with files.scratch(out) as folder:
        made = folder / "made"
        (made / "plots").mkdir(parents=True)
        elements = drawing.draw_all(report, made / "plots", workers=workers)
        for table in report.tables:
            stem = "accuracy" if len(report.tables) == 1 else f"accuracy-{table.protocol}"
            (made / f"{stem}.md").write_text(markdown(table), encoding="utf-8")
            (made / f"{stem}.tex").write_text(latex(table), encoding="utf-8")
        (made / "accuracy.csv").write_text(csv_text(report.tables), encoding="utf-8")
        for i, held in enumerate(report.published):
            stem = "published" if len(report.published) == 1 else f"published-{i}"
            (made / f"{stem}.md").write_text(published.markdown(held), encoding="utf-8")
            (made / f"{stem}.csv").write_text(published.csv_text(held), encoding="utf-8")
        (made / "report.html").write_text(page.html(report, elements, title=title, date=date), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        files.place(made, out)
    return sorted(path for path in out.iterdir() if path.is_file())
