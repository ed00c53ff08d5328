"""A dot plot of published figures and ours: methods, one panel for each setting."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .plots import COLUMN, Style, blank, clean
from .published import Held

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(rows: list[Held], style: Mapping[str, Style], title: str) -> "Figure":
    """Draw the methods of one setting, the highest published figure at the top.

    A hollow mark is the published figure, a filled one is ours with its standard deviation over seeds, and a bar across
    the line is the mean of our worst 10 % of the clients. `style` has the look of each method by its name in `rows`.
    """
    from matplotlib.lines import Line2D

    rows = sorted(rows, key=lambda row: row.published)
    out = blank(COLUMN, 1.1 + 0.27 * len(rows))
    axes = out.subplots()
    for y, row in enumerate(rows):
        look = style[row.method]
        axes.plot(100 * row.published, y, marker="o", markersize=7, markerfacecolor="none", color=look.color, zorder=3)
        held, worst = row.held, row.ours.get((f"{row.against[0]}_worst10", row.against[1]))
        if held is not None:
            axes.errorbar(
                100 * held.mean, y, xerr=None if held.std is None else 100 * held.std, marker="o", markersize=5,
                color=look.color, capsize=2, zorder=4,
            )  # fmt: skip
        if worst is not None:
            axes.plot(100 * worst.mean, y, marker="|", markersize=9, color=look.color, zorder=2)
    axes.set_yticks(range(len(rows)), [row.method for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("accuracy, %")
    clean(axes, "x")
    marks = (("o", "none", "published"), ("o", "black", "ours"), ("|", "black", "our worst 10 %"))
    handles = [
        Line2D([], [], linestyle="", marker=mark, color="black", markerfacecolor=fill, label=label)
        for mark, fill, label in marks
    ]
    out.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8, columnspacing=1)
    axes.set_title(title, fontsize=10, loc="left")
    return out
