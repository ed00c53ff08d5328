"""The files of a record: their names and columns, and one function that reads and checks them.

    run.json            schema, spec, status, summary, fingerprints, versions, machine
    rounds.jsonl        a line per round: its training
    evaluations.jsonl   a line per evaluation
    clients.parquet     a row per client and evaluation
    samples.parquet     a row per client and class

Schema 1 had no `evaluations.jsonl`: the metrics of an evaluation were in the line of its round, whose seconds covered
both training and evaluation. `read` gives such a record the shape of schema 2.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pflbench.core import registry
from pflbench.errors import UsageError
from pflbench.spec import RunSpec

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = 2
READABLE = (1, 2)

METRICS = {
    "accuracy": "accuracy, weighted by test samples",
    "accuracy_mean": "accuracy, plain mean of the clients",
    "accuracy_worst10": "accuracy of the worst 10 % of the clients",
    "accuracy_std": "standard deviation of accuracy over the clients",
    "global_accuracy": "accuracy of the global model, weighted by test samples",
    "own_accuracy": "accuracy of the clients' own models after their last training, weighted by test samples",
    "own_accuracy_mean": "accuracy of the clients' own models after their last training, plain mean of the clients",
    "own_accuracy_worst10": "accuracy of the worst 10 % of the clients' own models after their last training",
    "own_accuracy_std": "standard deviation of accuracy over the clients' own models after their last training",
}
"""What an evaluation measures, and what each name means."""
OWN = tuple(name for name in METRICS if name.startswith("own_"))
"""The metrics of the clients' own models; a record has them if the run's setting `tested` is "both"."""
BYTES = ("bytes_up", "bytes_down")
PASSES = ("steps", "forward", "backward")
"""Optimiser steps, and samples in forward and backward passes of training."""
TIMES = ("seconds", "busy_seconds")
"""Wall-clock time, and the sum of the workers' times. They differ between equal runs, so no fingerprint covers them."""
ROUND = ("round", "participants", "train_loss", *BYTES, *PASSES, *TIMES)
EVALUATION = ("round", *(name for name in METRICS if name not in OWN), "test_loss", *PASSES, *TIMES)
CLIENTS = {"round": "int32", "client": "int32", "n": "int32", "accuracy": "float64", "global_accuracy": "float64"}
OWN_CLIENTS = {**CLIENTS, "own_accuracy": "float64"}
SAMPLES = {"client": "int64", "class": "int64", "train": "int64", "test": "int64"}
SEEDS = tuple(name for name in RunSpec.__dataclass_fields__ if name == "seed" or name.endswith("_seed"))
"""The settings in which repetitions of a run differ."""
_NO_RUNS = ("tensorboard",)  # other folders that pflbench writes next to the runs
_RUN = ("id", "status", "reason", "summary", "spec", "fingerprints", "versions", "machine")
_TABLES = ("summary", "fingerprints", "versions", "machine")
_FINGERPRINTS = ("data", "algorithm", "metrics")

Rows = Sequence[Mapping[str, Any]]


class RecordError(UsageError):
    """A record that cannot be used. `reason` is the message without the folder and the remedy."""

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        super().__init__(f"{path}: {reason}; {remedy}")
        self.reason = reason


@dataclass(frozen=True)
class Contents:
    """What a record's folder holds, in the shape of schema 2.

    `run` is `run.json`; its `schema` is the schema of the files. `spec` has the settings of `run`, and the defaults of
    settings that are newer than the record. `rounds` and `evaluations` have the columns `ROUND` and `EVALUATION`; the
    tables `clients` and `samples` have `CLIENTS` and `SAMPLES`. If the clients' own models were tested, `evaluations`
    also has the metrics `OWN`, and `clients` has the columns `OWN_CLIENTS`. In a record of schema 1 the passes and
    times of evaluations are None, and the seconds of a round contain its evaluation.
    """

    run: dict[str, Any]
    spec: RunSpec
    rounds: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    clients: "pa.Table"
    samples: "pa.Table"


def folders(paths: Iterable[Path | str]) -> list[Path]:
    """Return the run folders in `paths`: run folders, or folders of them. A file in such a folder is returned, too.

    Raises `UsageError` when a path does not exist.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UsageError(f"runs: {path} does not exist; `pflbench run` and `pflbench sweep` write records")
        alone = (path / "run.json").exists() or path.suffix == ".partial" or not path.is_dir()
        inside = [path] if alone else sorted(path.iterdir())
        found += [p for p in inside if not p.name.startswith(".") and p.name not in _NO_RUNS]
    return found


def read(path: Path) -> Contents:
    """Read the record in folder `path`, and check that its files are complete and belong together.

    The checks cover the schema, the id, the columns, the numbers of rows, and the fingerprint of the metrics without
    the times. Raises `RecordError`, which is a `UsageError`, when the record cannot be used.
    """
    try:
        run = json.loads((path / "run.json").read_text(encoding="utf-8"))
        if run["schema"] in READABLE:
            return _read(path, run)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        text = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        reason = f"not a readable record ({text or type(error).__name__})"
        raise RecordError(path, reason, "move it away or use --force") from None
    reason = f"record schema {run['schema']} is not {' or '.join(map(str, READABLE))}"
    raise RecordError(path, reason, "use the pflbench that wrote it")


def _read(path: Path, run: dict[str, Any]) -> Contents:
    _check_names([run], _RUN)
    for name in _TABLES:
        if not isinstance(run[name], dict):
            raise TypeError(f"{name} in run.json is {run[name]!r}, not a table")
    spec = RunSpec.from_dict(run["spec"])
    clients = _read_table(path / "clients.parquet", clients_columns(spec))
    samples = _read_table(path / "samples.parquet", SAMPLES)
    rounds = _read_lines(path / "rounds.jsonl")
    if run["schema"] == 1:
        fingerprint = metrics_fingerprint_1(rounds, clients.to_pylist())
        rounds, evaluations = _split(rounds)
    else:
        evaluations = _read_lines(path / "evaluations.jsonl")
        fingerprint = metrics_fingerprint(rounds, evaluations, clients.to_pylist())
    _check_names([run["fingerprints"]], _FINGERPRINTS)
    _check_names(rounds, ROUND)
    _check_names(evaluations, (*EVALUATION, *OWN) if spec.tested == "both" else EVALUATION)
    if (
        spec.run_id(hyperparameters(spec.algo)) != run["id"]
        or fingerprint != run["fingerprints"]["metrics"]
        or len(rounds) != run["summary"]["rounds"]
        or len(clients) != len(evaluations) * spec.clients
    ):
        raise ValueError("its files do not belong together or are damaged")
    return Contents(run, spec, rounds, evaluations, clients, samples)


def clients_columns(spec: RunSpec) -> dict[str, str]:
    """Return the columns of a run's clients.parquet."""
    return OWN_CLIENTS if spec.tested == "both" else CLIENTS


@cache
def hyperparameters(algo: str) -> "Mapping[str, Field[Any]]":
    """Return the hyperparameters of a method; none if it is not installed."""
    try:
        return registry.describe(algo).hyperparameters
    except UsageError:
        return {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _read_table(path: Path, columns: Mapping[str, str]) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # One read by one thread is twice as fast for such a small file.
        return pq.ParquetFile(pa.BufferReader(path.read_bytes())).read(use_threads=False).cast(_arrow(columns))
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from None


def _check_names(rows: Iterable[Mapping[str, Any]], names: Iterable[str]) -> None:
    for row in rows:
        for name in names:
            if name not in row:
                raise KeyError(name)


def _split(lines: Rows) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rounds and the evaluations of the lines of schema 1."""
    measured = (*(name for name in METRICS if name not in OWN), "test_loss")
    unknown = dict.fromkeys((*PASSES, *TIMES))
    rounds = [{name: value for name, value in line.items() if name not in measured} for line in lines]
    evaluations = [
        {"round": line["round"], **{name: line[name] for name in measured}, **unknown}
        for line in lines
        if "accuracy" in line
    ]
    return rounds, evaluations


def table(rows: Rows, columns: Mapping[str, str]) -> "pa.Table":
    """Return `rows` as a table with the columns `CLIENTS` or `SAMPLES`, for the record's parquet files."""
    import pyarrow as pa

    return pa.Table.from_pylist(list(rows), schema=_arrow(columns))


def _arrow(columns: Mapping[str, str]) -> "pa.Schema":
    import pyarrow as pa

    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])


def metrics_fingerprint(rounds: Rows, evaluations: Rows, clients: Rows) -> str:
    """Return the fingerprint of all measurements, except the times, of a run of schema 2."""
    return _sha256([_without_times(rounds), _without_times(evaluations), clients])


def metrics_fingerprint_1(rounds: Rows, clients: Rows) -> str:
    """Return the fingerprint of all measurements, except the times, of a run of schema 1; `rounds` are its lines."""
    return _sha256([_without_times(rounds), clients])


def _without_times(rows: Rows) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
