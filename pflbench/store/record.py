"""Records: the settings, the data, the machine and the results of one run.

runs/<id>/run.json            schema, spec, status, summary, fingerprints, versions, machine
runs/<id>/rounds.jsonl        a line per round of training
runs/<id>/evaluations.jsonl   a line per evaluation
runs/<id>/clients.parquet     round, client, n, accuracy, ... of every client at every evaluation
runs/<id>/samples.parquet     client, class, numbers of training and test samples
runs/<id>/checkpoint/         the final state of server and clients (pflbench/store/checkpoint.py)
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pflbench.core.params import State
from pflbench.errors import UsageError
from pflbench.spec import RunSpec
from pflbench.store import schema
from pflbench.store.checkpoint import Checkpoint, checkpoints
from pflbench.store.states import ClientStates, digest, load_state

Row = dict[str, Any]


@dataclasses.dataclass
class Record:
    """The record of one run.

    `rounds` has a dict per round of training, `evaluations` one per evaluation, `clients` one per client and
    evaluation; accuracies are fractions. `samples` has a dict for each client and class (`Federation.counts`).

    `server` and `client_states` are the final states; for a record from disk, `load_states` reads them. `path` is the
    record's folder, None if the record was not written.
    """

    id: str
    spec: RunSpec
    status: str = "running"
    reason: str | None = None
    rounds: list[Row] = dataclasses.field(default_factory=list)
    evaluations: list[Row] = dataclasses.field(default_factory=list)
    clients: list[Row] = dataclasses.field(default_factory=list)
    samples: list[dict[str, int]] = dataclasses.field(default_factory=list, repr=False)
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    server: State = dataclasses.field(default_factory=dict, repr=False)
    client_states: Mapping[int, State] = dataclasses.field(default_factory=dict, repr=False)
    path: Path | None = None

    @property
    def summary(self) -> dict[str, Any]:
        """The main results: the last evaluation, the mean of the last five, the best round on test, and the costs.

        `seconds` and `busy_seconds` are of training. `evaluation` has those of evaluations, None if they are unknown
        (schema 1). If the clients' own models are tested, `own_best_on_test` is their best round on test.
        """
        rows = self.evaluations
        costs = {
            "rounds": len(self.rounds),
            "bytes_up": sum(r["bytes_up"] for r in self.rounds),
            "bytes_down": sum(r["bytes_down"] for r in self.rounds),
            **{name: sum(r[name] for r in self.rounds) for name in schema.TIMES},
            "evaluation": {name: _sum(r[name] for r in rows) for name in schema.TIMES},
        }
        if not rows:
            return costs
        last = {name: rows[-1][name] for name in schema.METRICS if name in rows[-1]}
        tail = rows[-5:]
        sums = {name: _sum(r[name] for r in tail) for name in last}
        last5 = {name: None if total is None else total / len(tail) for name, total in sums.items()}
        best = {"best_on_test": _best(rows, "accuracy")}
        if "own_accuracy" in last:
            best["own_best_on_test"] = _best(rows, "own_accuracy")
        return {"last": last, "last5": last5, **best, **costs}

    def states_fingerprint(self) -> str:
        """Return the fingerprint of the final states of the server and of all clients."""
        assert isinstance(self.client_states, ClientStates)  # noqa: S101
        return hashlib.sha256(json.dumps([digest(self.server), self.client_states.digests()]).encode()).hexdigest()

    def metrics_fingerprint(self) -> str:
        """Return the fingerprint of all metrics except the times."""
        return schema.metrics_fingerprint(self.rounds, self.evaluations, self.clients)

    def to_dict(self) -> dict[str, Any]:
        """Return what `run.json` holds."""
        return {
            "schema": schema.SCHEMA,
            "id": self.id,
            "status": self.status,
            "reason": self.reason,
            "summary": self.summary,
            "spec": self.spec.to_dict(),
            "fingerprints": self.fingerprints,
            "versions": self.versions,
            "machine": self.machine,
        }

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the record in folder `path`, without its states. Raises `UsageError` when it cannot be read."""
        found = schema.read(path)
        names = ("id", "status", "reason", "fingerprints", "versions", "machine")
        return cls(
            spec=found.spec,
            rounds=found.rounds,
            evaluations=found.evaluations,
            clients=found.clients.to_pylist(),
            samples=found.samples.to_pylist(),
            path=path,
            **{name: found.run[name] for name in names},
        )

    def load_states(self) -> None:
        """Read the final states from the record's folder; a client's state is read when it is used.

        Raises `RunError` for damaged files.
        """
        if self.path is None:
            raise UsageError("the record was not written to disk, so its states cannot be read")
        folder = self.path / "checkpoint"
        newest = Checkpoint.read(next(iter(checkpoints(folder)), folder))
        newest.verify_states(folder)
        self.server = load_state(folder / newest.server.file)
        initial = load_state(folder / newest.initial.file)
        self.client_states = ClientStates(self.spec.clients, initial, dict(newest.clients), folder)


def _best(rows: list[Row], metric: str) -> Row:
    best = max(rows, key=lambda row: row[metric])
    return {"round": best["round"], metric: best[metric]}


def _sum(values: Iterable[float | None]) -> float | None:
    """Return the sum of `values`; None if one of them is unknown."""
    found = list(values)
    return None if None in found else sum(value for value in found if value is not None)
