"""The plot of a partition: the number of samples of each client in each class."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .svg import LINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Above these limits, bubbles would touch or be too small to see, so a heat map is drawn.
_MAX_BUBBLE_CLIENTS = 50
_MAX_BUBBLE_CLASSES = 30
_MAX_NAMED_CLASSES = 30

_BLUE = "#0072b2"  # of Okabe and Ito's palette for all kinds of colour vision


def draw(counts: npt.NDArray[np.int64], class_names: Sequence[str], title: str, paths: Sequence[Path]) -> None:
    """Write `figure` to each of `paths`, in the format of its suffix (.png, .svg). Equal input gives equal bytes."""
    import matplotlib as mpl

    made = figure(counts, class_names, title)
    for path in paths:
        # Without the salt and the date, matplotlib writes random ids and the time into an SVG.
        with mpl.rc_context({"svg.hashsalt": "pflbench"}):
            made.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def figure(counts: npt.NDArray[np.int64], class_names: Sequence[str], title: str) -> "Figure":
    """Return the plot of `counts` (samples, [clients, classes]).

    Clients are on the x axis, classes on the y axis. For up to 50 clients and 30 classes, it has bubbles whose areas
    are in proportion to the counts; for more, it is a heat map.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    clients, classes = counts.shape
    small = clients <= _MAX_BUBBLE_CLIENTS and classes <= _MAX_BUBBLE_CLASSES
    width = min(max(4.0 + 0.28 * clients, 6.5), 14.0)
    height = min(max(1.6 + 0.28 * classes, 3.6), 9.0)
    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.add_subplot()
    (_bubbles if small else _heat_map)(made, axes, counts)
    axes.set_title(title)
    axes.set_xlabel("client")
    axes.set_ylabel("class")
    axes.set_xlim(-0.5, clients - 0.5)
    axes.set_ylim(classes - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if clients <= _MAX_BUBBLE_CLIENTS:
        axes.set_xticks(range(0, clients, 1 if clients <= 25 else 5))
    if classes <= _MAX_NAMED_CLASSES:
        axes.set_yticks(range(classes), class_names)
    return made


def _bubbles(figure: "Figure", axes: "Axes", counts: npt.NDArray[np.int64]) -> None:
    # Areas in square points (1/72 inch): the largest bubble just fits its cell, the smallest is still visible.
    largest, smallest = 17.0**2, 4.0
    x, y = np.nonzero(counts)
    areas = np.maximum(largest * counts[x, y] / counts.max(), smallest)
    axes.scatter(x, y, s=areas, color=_BLUE, alpha=0.85, linewidths=0)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    top = int(counts.max())
    for size in sorted({top, max(top // 4, 1), max(top // 16, 1)}):
        axes.scatter([], [], s=largest * size / top, color=_BLUE, alpha=0.85, linewidths=0, label=f"{size:,}")
    figure.legend(title="samples", loc="outside right upper", frameon=False, labelspacing=1.0)


def _heat_map(figure: "Figure", axes: "Axes", counts: npt.NDArray[np.int64]) -> None:
    from matplotlib.colors import LogNorm

    # Logarithmic, because a skewed partition has cells of 1 and of 1,000; cells without samples are blank.
    held = np.ma.masked_equal(counts.T, 0)
    image = axes.imshow(
        held, aspect="auto", interpolation="nearest", cmap="viridis_r", norm=LogNorm(1, max(int(counts.max()), 2))
    )
    bar = figure.colorbar(image, ax=axes, label="samples (none: blank)", pad=0.01)
    bar.ax.yaxis.set_major_formatter("{x:,.0f}")
