"""Records as tables, statistics and plots. Nothing here imports torch.

`load(path)` gives pandas DataFrames (docs/reports.md); `pflbench report` makes the rest.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pflbench.store.schema import METRICS

    from .frames import SELECTIONS, Runs, client_scores, export, load, scores

__all__ = ["METRICS", "SELECTIONS", "Runs", "client_scores", "export", "load", "scores"]


def __getattr__(name: str) -> Any:
    """Import pandas only when it is asked for: drawing a partition does without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import frames

    return getattr(frames, name)
