"""Two runs side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pflbench.errors import UsageError
from pflbench.store import schema

from . import stats
from .frames import SELECTIONS, Runs, client_scores, load, scores
from .metrics import METRICS

_PARTS = ("fingerprints", "versions", "machine")


@dataclass(frozen=True)
class Comparison:
    """The differences between two runs, by name; their metrics; and the test of the clients' accuracies.

    Without a test, `test` says why there is none.
    """

    runs: tuple[str, str]
    differences: dict[str, tuple[Any, Any]]
    metrics: dict[str, tuple[float, float]]
    test: str


def compare(a: Path, b: Path, selection: str = "last") -> Comparison:
    """Compare the records in folders `a` and `b`. Raises `UsageError` unless both are finished runs."""
    loaded = [load(path) for path in (a, b)]
    for path, found in zip((a, b), loaded, strict=True):
        if len(found.runs) != 1:
            reason = f": {found.left_out['reason'].iloc[0]}" if len(found.left_out) else ""
            raise UsageError(f"{path} is not one finished run{reason}")
    contents = [schema.read(path) for path in (a, b)]
    one, other = (_flat({"spec": c.spec.to_dict(), **{part: c.run[part] for part in _PARTS}}) for c in contents)
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    metrics = {}
    for metric in METRICS:
        x, y = (float(scores(found, metric, selection).iloc[0]) for found in loaded)
        metrics[metric] = (x, y)
    return Comparison(
        (contents[0].run["id"], contents[1].run["id"]),
        {name: (one.get(name), other.get(name)) for name in names},
        metrics,
        _test(loaded, [found.run for found in contents], selection),
    )


def _test(loaded: list[Runs], runs: list[dict[str, Any]], selection: str) -> str:
    for name in ("data", "partition"):
        if runs[0]["fingerprints"].get(name) != runs[1]["fingerprints"].get(name):
            return f"The two runs differ in {name}, so their clients are not pairs, and no test is made."
    x, y = (client_scores(found, "accuracy", selection).iloc[0].to_numpy() for found in loaded)
    better, worse = stats.paired(x, y), stats.paired(y, x)
    if better is None or worse is None:
        return f"Fewer than {stats.FEWEST_PAIRS} clients differ in accuracy, too few for a test."
    p = min(1.0, 2 * min(better, worse))
    kind = "significant at 5 %" if p < stats.LEVEL else "not significant"
    return (
        f"Wilcoxon's signed-rank test over {len(x)} clients, {SELECTIONS[selection]}: p = {p:.3g}, two-sided: {kind}. "
        f"The first is better for {int((x > y).sum())} clients, the second for {int((x < y).sum())}. "
        "Each side is one run, so the test says nothing about other seeds."
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out
