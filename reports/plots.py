"""The plots of a report. A method has the same colour, marker and line in all plots; a family of methods has a hue."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from .frames import Runs
from .svg import LINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .stats import Ranks

# Two shades of a hue for each family. Each has a contrast of 3:1 or more to a light and to a dark page, so the hues are
# those of Okabe and Ito only where theirs have it. Markers tell methods apart where colours do not, for all eyes.
_HUES = {
    "personal part of the network": ("#0072b2", "#3e97cf"),
    "one global model": ("#d55e00", "#b85100"),
    "fine-tuning and meta-learning": ("#009e73", "#00805d"),
    "mixture of models": ("#cc79a7", "#b0578a"),
    "personal model beside the global one": ("#7a5fc7", "#a07fe0"),
    "prototypes": ("#ad7800", "#8a6500"),
}
_OTHER = ("#868e96", "#6a727a")
_MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★", "<": "◀", ">": "▶"}
_LINES = ("-", "--", ":", "-.")
_HATCHES = ("", "///", "...", "xxx", "---", "ooo", "|||", "***", "+++", "OO")
COLUMN = 3.55  # inches: a phone's width, and the width of a column of a paper


FACTORS = {
    "alpha": ("alpha", "Dirichlet α (small: uneven)"),
    "join_ratio": ("join ratio", "join ratio P"),
}
"""The settings against which accuracy is drawn: their names, and the labels of their axes."""


@dataclass(frozen=True)
class Style:
    """How a method is drawn."""

    color: str
    linestyle: str = "-"
    marker: str = "o"
    hatch: str = ""

    @property
    def glyph(self) -> str:
        """The marker as a character."""
        return _MARKS[self.marker]


def styles(families: Mapping[str, str]) -> dict[str, Style]:
    """Return a style for each method; `families` has its family. Forty methods are told apart without any colour.

    Methods of a family share a hue. Ten methods, of any families, differ in marker and hatch; more, also in lines.
    """
    marks, count, out = list(_MARKS), dict.fromkeys(families.values(), 0), {}
    for i, (method, family) in enumerate(families.items()):
        shades = _HUES.get(family, _OTHER)
        colour = shades[count[family] % len(shades)]
        count[family] += 1
        mark = i % len(marks)
        out[method] = Style(colour, _LINES[i // len(marks) % len(_LINES)], marks[mark], _HATCHES[mark])
    return out


def curves(runs: Runs) -> pd.DataFrame:
    """Return the evaluations of all runs with the costs of each run before each evaluation.

    `megabytes` and `elapsed` (seconds) are the costs of training, `evaluating` has the seconds of the evaluations, this
    one included.
    """
    rounds = runs.rounds.sort_values(["run", "round"])
    sums = rounds.assign(bytes=rounds["bytes_up"] + rounds["bytes_down"]).groupby("run")[["bytes", "seconds"]].cumsum()
    costs = rounds[["run", "round"]].assign(megabytes=sums["bytes"] / 1e6, elapsed=sums["seconds"])
    evaluations = runs.evaluations.sort_values(["run", "round"])
    found = evaluations[["run", "round", "accuracy"]].assign(
        evaluating=evaluations.groupby("run")["seconds"].cumsum(),
    )
    return found.merge(costs, on=["run", "round"]).merge(runs.runs[["run", "method", "setting"]], on="run")


COSTS = ("round", "megabytes", "elapsed")
"""What accuracy is drawn against in a setting: rounds, megabytes of uploads and downloads, and seconds."""


def learning(
    data: pd.DataFrame,
    style: Mapping[str, Style],
    title: str,
    time: str = "seconds of training",
    costs: Sequence[str] = COSTS,
) -> "Figure":
    """Draw accuracy against each of `costs` for one setting: means over seeds, with their range.

    `time` is the label of the seconds. A single panel has no legend and no title: the page has them.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    alone = len(costs) == 1
    # The layout is fixed: an automatic layout of three panels and a legend would take most of the time.
    width, height = (COLUMN, 2.7) if alone else (10.5, 3.4)
    legend = 0.6 + 0.075 * max(len(str(method)) for method in data["method"])
    figure = Figure(figsize=(width, height))
    if alone:
        figure.subplots_adjust(left=0.16, right=0.97, bottom=0.18, top=0.97)
    else:
        figure.subplots_adjust(left=0.055, right=1 - (legend + 0.15) / width, bottom=0.15, top=0.9, wspace=0.12)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for method, rows in _groups(data, style):
        look = style[method]
        seeds = 100 * rows.pivot(index="round", columns="run", values="accuracy").dropna()  # evaluated in all runs
        low, mean, high = seeds.min(axis=1), seeds.mean(axis=1), seeds.max(axis=1)
        for axes, column in zip(panels, costs, strict=True):
            x = rows.groupby("round")[column].mean()[seeds.index]
            axes.plot(
                x, mean, color=look.color, linestyle=look.linestyle, linewidth=1.4, label=method, marker=look.marker,
                markersize=4, markevery=max(len(x) // 6, 1), clip_on=False,
            )  # fmt: skip
            if seeds.shape[1] > 1:
                axes.fill_between(x, low, high, color=look.color, alpha=0.15, linewidth=0)
    labels = {"round": "round", "megabytes": "megabytes of uploads and downloads", "elapsed": time}
    for axes, column in zip(panels, costs, strict=True):
        axes.set_xlabel(labels[column])
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=column == "round"))
        clean(axes)
    panels[0].set_ylabel("accuracy, %")
    if not alone:
        _legend(figure, panels[0], title, outside=False)
    return figure


def _groups(data: pd.DataFrame, style: Mapping[str, Style]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each method in `data` with its rows, in the order of `style`."""
    groups = {str(method): rows for method, rows in data.groupby("method")}
    for method in style:
        if method in groups:
            yield method, groups[method]


def clients(values: dict[str, npt.NDArray[np.float64]], style: Mapping[str, Style], title: str) -> "Figure":
    """Draw the distribution of the clients' accuracies (fractions, of all seeds) of each method in one setting."""
    figure = blank(COLUMN, 1.0 + 0.26 * len(values))
    axes = figure.subplots()
    names = list(reversed(values))
    boxes = axes.boxplot(
        [100 * values[name][np.isfinite(values[name])] for name in names], widths=0.6, patch_artist=True,
        orientation="horizontal", medianprops={"color": "black"},
        flierprops={"marker": ".", "markersize": 3, "alpha": 0.6},
    )  # fmt: skip
    for box, name in zip(boxes["boxes"], names, strict=True):
        box.set(facecolor=style[name].color, alpha=0.55, hatch=style[name].hatch)
    axes.set_yticks(range(1, len(names) + 1), names)
    axes.set_xlabel("accuracy of a client, %")
    clean(axes)
    axes.set_title(title, fontsize=10, loc="left")
    return figure


def against(
    points: pd.DataFrame, style: Mapping[str, Style], title: str, factor: str = "alpha", *, alone: bool = False
) -> "Figure":
    """Draw accuracy against `factor`, "alpha" or "join_ratio". `points` has method, factor, mean and std, fractions.

    With `alone` there is no legend: the page has it.
    """
    figure = blank(COLUMN if alone else 6.2, 2.7 if alone else 3.6)
    axes = figure.subplots()
    for method, rows in _groups(points.sort_values(factor), style):
        look = style[method]
        axes.errorbar(
            rows[factor], 100 * rows["mean"], yerr=None if rows["std"].isna().any() else 100 * rows["std"],
            color=look.color, linestyle=look.linestyle, marker=look.marker, markersize=4, capsize=2, linewidth=1.3,
            label=method,
        )  # fmt: skip
    if factor == "alpha":
        axes.set_xscale("log")
    ticks = sorted(points[factor].unique())
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(FACTORS[factor][1])
    axes.set_ylabel("accuracy, %")
    clean(axes)
    if alone:
        axes.set_title(title, fontsize=10, loc="left")
    else:
        _legend(figure, axes, title)
    return figure


def critical_difference(found: "Ranks", groups: Sequence[tuple[str, str]], title: str) -> "Figure":
    """Draw average ranks, the best at the left; bars join methods that do not differ significantly (Nemenyi)."""
    names, ranks = list(found.ranks.index), [float(rank) for rank in found.ranks]
    k = len(names)
    half = (k + 1) // 2
    height = 1.0 + 0.28 * half + 0.16 * len(groups)
    figure = blank(6.4, height)
    axes = figure.subplots()
    axes.set_xlim(0.2, k + 0.8)
    floor = -(0.16 * len(groups) + 0.28 * half + 0.3)
    axes.set_ylim(floor, 0.75)
    axes.axis("off")
    axes.hlines(0, 1, k, color="black", linewidth=1)
    for tick in range(1, k + 1):
        axes.vlines(tick, 0, 0.08, color="black", linewidth=1)
        axes.text(tick, 0.13, str(tick), ha="center", va="bottom", fontsize=8)
    axes.hlines(0.5, 1, 1 + found.difference, color="black", linewidth=2)
    axes.text(1, 0.54, f"critical difference {found.difference:.2f}", fontsize=8, va="bottom")
    for i, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        left = i < half
        level = -(0.16 * len(groups) + 0.25 + 0.28 * (i if left else k - 1 - i))
        end = 0.9 if left else k + 0.1
        axes.plot([rank, rank, end], [0, level, level], color="black", linewidth=0.8)
        text = f"{name}  {rank:.2f}" if left else f"{rank:.2f}  {name}"
        axes.text(end + (-0.05 if left else 0.05), level, text, ha="right" if left else "left", va="center", fontsize=8)
    for i, (first, last) in enumerate(groups):
        y = -0.1 - 0.16 * i
        axes.hlines(y, found.ranks[first] - 0.05, found.ranks[last] + 0.05, color="black", linewidth=3)
    axes.set_title(title, fontsize=10, loc="left")
    return figure


def save(figure: "Figure", folder: Path, name: str) -> None:
    """Write a figure as PNG, for web pages, and as PDF, for papers. Equal data gives equal bytes."""
    import matplotlib as mpl

    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()  # one layout for both files
        figure.set_layout_engine("none")
    # TrueType fonts, which editors can read. For PDF files, matplotlib also uses the setting of PostScript.
    with mpl.rc_context({"pdf.fonttype": 42, "ps.fonttype": 42}):
        figure.savefig(folder / f"{name}.png", dpi=150)
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})


def blank(width: float, height: float) -> "Figure":
    """Return an empty figure of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def clean(axes: "Axes", lines: Literal["both", "x"] = "both") -> None:
    """Draw a faint grid below the data, with `lines` of both axes or of one, and no frame."""
    axes.grid(axis=lines, color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: "Figure", axes: "Axes", title: str, *, outside: bool = True) -> None:
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    handles, names = axes.get_legend_handles_labels()
    place: Literal["outside right upper", "upper right"] = "outside right upper" if outside else "upper right"
    figure.legend(handles, names, loc=place, frameon=False, fontsize=8, handlelength=2.6)
