"""What is in folders of runs, read from `run.json` alone; and runs found by their ids."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pflbench.errors import UsageError
from pflbench.spec import RunSpec
from pflbench.store import schema
from pflbench.store.partial import newest, run_of

_FEWEST = 4  # characters of an id that are enough to name a run


@dataclass(frozen=True)
class Entry:
    """A run's folder.

    `status` is that of `run.json` ("finished", "diverged", ...), "unfinished" for an interrupted run and for a run that
    is being computed, "replaced" for a record in whose place is a newer one, or "unreadable". `reason` explains it, if
    it needs an explanation. `spec` is None if it is not known. `rounds` counts the trained rounds up to the newest
    checkpoint, and `accuracy` is that of the last evaluation, a fraction; None if unknown.
    """

    id: str
    path: Path
    status: str
    reason: str | None = None
    spec: RunSpec | None = None
    rounds: int | None = None
    accuracy: float | None = None


def entries(paths: Iterable[Path | str]) -> list[Entry]:
    """Return the runs in `paths`, run folders or folders of them, sorted by settings; runs without a spec come last.

    Files and folders that are no runs are left out. Raises `UsageError` when a path does not exist.
    """
    found = [_entry(path) for path in schema.folders(paths) if _is_run(path)]
    return sorted(found, key=lambda entry: (entry.spec is None, _order(entry.spec), entry.id, entry.path))


def find(text: str, out: Path) -> Path:
    """Return the path `text`, or else the folder of the run in `out` whose id begins with `text`, 4 characters or more.

    Raises `UsageError` when there is no such run, or more than one.
    """
    path = Path(text)
    if path.exists() or path.name != text or not out.is_dir():
        return path
    # A record comes after a partial folder of the same run, and this after a replaced record; the last one counts.
    order = {".old": 0, ".partial": 1}
    known = {run_of(p): p for p in sorted(schema.folders([out]), key=lambda p: order.get(p.suffix, 2)) if _is_run(p)}
    matching = [run for run in known if run.startswith(text)] if len(text) >= _FEWEST else []
    if text in matching or len(matching) == 1:
        return known[text if text in matching else matching[0]]
    if matching:
        raise UsageError(f"runs: {text!r} begins several ids: {_some(matching)}; give more characters")
    there = f"it has {_some(known)}" if known else "it has no runs"
    raise UsageError(f"runs: {text!r} is no folder, and no id of a run in {out} (or its first {_FEWEST}); {there}")


def _some(runs: Iterable[str], most: int = 5) -> str:
    found = sorted(runs)
    rest = f" and {len(found) - most} more (see `pflbench runs`)" if len(found) > most else ""
    return ", ".join(found[:most]) + rest


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file() or (path.is_dir() and path.suffix == ".partial")


def _entry(path: Path) -> Entry:
    if path.suffix == ".partial":
        return Entry(run_of(path), path, "unfinished", rounds=newest(path))
    try:
        run = json.loads((path / "run.json").read_text(encoding="utf-8"))
        if run["schema"] not in schema.READABLE:
            return Entry(run_of(path), path, "unreadable", f"record schema {run['schema']}")
        return Entry(
            id=str(run["id"]),
            path=path,
            status="replaced" if path.suffix == ".old" else str(run["status"]),
            reason=run["reason"],
            spec=RunSpec.from_dict(run["spec"]),
            rounds=run["summary"].get("rounds"),
            accuracy=run["summary"].get("last", {}).get("accuracy"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        return Entry(run_of(path), path, "unreadable", " ".join(str(error).split()))


def _order(spec: RunSpec | None) -> tuple[object, ...]:
    if spec is None:
        return ()
    numbers = (spec.alpha, spec.classes_per_client)
    others = (spec.clients, spec.join_ratio, spec.algo, json.dumps(dict(spec.hyperparameters)), spec.seed)
    return (spec.dataset, spec.partition, *(value or 0 for value in numbers), *others)
