"""Figures as SVG for a page: text as text, colours of the page, nothing that differs between equal figures."""

import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE = "#e5e5e5"
"""The colour of a grid, which the page replaces by its own."""
_COLOURS = {"#000000": "currentColor", LINE: "var(--line)"}


def inline(figure: "Figure", name: str, title: str) -> str:
    """Return `figure` as an element of a page; `name` makes its ids unique there, `title` is read to who cannot see it.

    Black becomes the colour of the page's text, and the grid that of its lines. The ground is transparent.
    """
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pflbench"}):
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, of_page in _COLOURS.items():
        text = text.replace(colour, of_page)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
