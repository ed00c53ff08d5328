"""Records as tables, statistics and plots. No module of this package imports torch.

`load(path)` gives pandas DataFrames (docs/reports.md); `pflbench report` writes the tables, statistics and plots.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .frames import SELECTIONS, Runs, client_scores, export, load, scores
    from .metrics import METRICS

__all__ = ["METRICS", "SELECTIONS", "Runs", "client_scores", "export", "load", "scores"]


def __getattr__(name: str) -> Any:
    """Import pandas only when a name is used: the plot of a partition does not need it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import frames

    return getattr(frames, name)
