"""The accuracy tables as Markdown, LaTeX, CSV and text for a terminal."""

import csv
import io
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .accuracy import AccuracyTable, Cell
from .frames import SELECTIONS
from .metrics import METRICS

if TYPE_CHECKING:
    from rich.table import Table as RichTable


def heading(table: AccuracyTable) -> str:
    """Return the heading that says what the numbers of a table are."""
    text = f"{METRICS[table.metric]}; {SELECTIONS[table.selection]}; in percent"
    return text[0].upper() + text[1:]


def grid(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table; all columns but the first `left` ones are right-aligned."""
    lines = [head, ["---" if i < left else "---:" for i in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(part.replace('|', '/') for part in line)} |" for line in lines)


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows, which have the same keys, as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def markdown(table: AccuracyTable) -> str:
    """Return the table as Markdown."""

    def cell(found: Cell | None) -> str:
        if found is None:
            return "missing"
        return {"best": "**{}**", "close": "<u>{}</u>", "": "{}"}[found.mark].format(found.text())

    labels = list(table.columns.values())
    body = [[method, *map(cell, table.row(method))] for method in table.rows]
    if len(table.levels) < 3:
        head = list(map(", ".join, labels))
    else:  # Markdown has one line of heads: the innermost heads are the first line of the body
        outer = [", ".join(label[:-1]) for label in labels]
        head = [text if i == 0 or text != outer[i - 1] else "" for i, text in enumerate(outer)]
        body.insert(0, ["", *(f"*{label[-1]}*" for label in labels)])
    text = grid(["method", *head], body)
    notes = "".join(f"- {note}\n" for note in table.notes)
    return f"{heading(table)}. Protocol: {table.title}.\n\n{text}\n\n{notes}"


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "α": r"$\alpha$"} | {
    char: "\\" + char for char in "&%$#_{}"
}


def tex(text: str) -> str:
    """Return `text` with LaTeX's special characters escaped."""
    return "".join(_TEX.get(char, char) for char in text)


def latex(table: AccuracyTable) -> str:
    """Return the table as LaTeX, for a document with `booktabs`."""

    def cell(found: Cell | None) -> str:
        if found is None:
            return "--"
        number = found.text().replace(" ± ", r"\,$\pm$\,")
        return {"best": r"\textbf{{{}}}", "close": r"\underline{{{}}}", "": "{}"}[found.mark].format(number)

    top = ""
    for heads in table.heads[:-1]:
        ends = list(itertools.accumulate((n for _, n in heads), initial=1))
        top += "  & " + " & ".join(rf"\multicolumn{{{n}}}{{c}}{{{tex(text)}}}" for text, n in heads) + " \\\\\n"
        top += "  " + " ".join(rf"\cmidrule(lr){{{a + 1}-{b}}}" for a, b in itertools.pairwise(ends)) + "\n"
    body = "\n".join(rf"  {tex(m)} & {' & '.join(map(cell, table.row(m)))} \\" for m in table.rows)
    notes = "".join(f"% {line}\n" for line in (f"{heading(table)}. Protocol: {table.title}.", *table.notes))
    return rf"""{notes.replace("±", "+-").replace("α", "alpha")}\begin{{tabular}}{{l{"r" * len(table.columns)}}}
  \toprule
{top}  method & {" & ".join(tex(label[-1]) for label in table.columns.values())} \\
  \midrule
{body}
  \bottomrule
\end{{tabular}}
"""


def rows(table: AccuracyTable) -> Iterator[dict[str, Any]]:
    """Yield a dict for each cell, and for each missing cell."""
    for method in table.rows:
        for labels, cell in zip(table.columns.values(), table.row(method), strict=True):
            found = cell or Cell(math.nan, None, None, ())
            low, high = found.interval or (None, None)
            yield {
                "protocol": table.title, **dict(zip(table.levels, labels, strict=True)), "algo": table.algos[method],
                "method": method, "metric": table.metric, "selection": table.selection,
                "mean": None if cell is None else found.mean, "std": found.std, "ci95_low": low, "ci95_high": high,
                "seeds": found.seeds, "mark": found.mark, "runs": " ".join(found.runs),
            }  # fmt: skip


def csv_text(tables: list[AccuracyTable]) -> str:
    """Return all tables as one CSV with a row per cell. Accuracies are fractions; `runs` has the ids of the runs."""
    return csv_of([row for table in tables for row in rows(table)])


def terminal(table: AccuracyTable) -> "RichTable":
    """Return the table for a terminal."""
    import rich.box
    from rich.table import Table
    from rich.text import Text

    out = Table(title=heading(table), caption=table.title, box=rich.box.SIMPLE_HEAD)
    out.title_justify = out.caption_justify = "left"
    out.add_column("method", no_wrap=True)
    for labels in table.columns.values():
        out.add_column("\n".join(labels), justify="right", no_wrap=True)
    for method in table.rows:
        styles = {"best": "bold", "close": "underline", "": ""}
        cells = [Text("missing", "dim") if c is None else Text(c.text(), styles[c.mark]) for c in table.row(method)]
        out.add_row(Text(method), *cells)
    return out
