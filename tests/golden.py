"""The results of every method on a small federation: numbers that no change of the code may change.

    python tests/golden.py freeze           write tests/golden.json
    python tests/golden.py refreeze         write the cases of CHANGED again
    python tests/golden.py bits             print the SHA-256 of every state, and the metrics, as JSON
    python tests/golden.py same-as FOLDER   compare with the `bits` of the pflbench in FOLDER (pip install --target)

The federation is float64, its numbers come from NumPy, and with its settings every part of the training loop changes
the results. States are compared by their tensors and numbers, not by names: their layout may change, their contents
may not.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import pflbench

FILE = Path(__file__).with_name("golden.json")
SIZES = (7, 4, 6, 5)
SETTINGS = {
    "full": {"rounds": 2, "momentum": 0.5, "weight_decay": 0.02, "lr_decay": 0.5, "shuffle": False},
    "partial": {"rounds": 3, "join_ratio": 0.5, "shuffle": True, "drop_last": True, "sampling_seed": 3},
    "norm": {"rounds": 2, "join_ratio": 0.75},
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "fedas": [{"alignment": "in-place"}, {"alignment": "off"}, {"weighting": "samples"}],
    "apfl": [{"adaptive": True}],
    "per-fedavg": [{"variant": "fo"}],
    "fedala": [{"layers": 2}],
    "fedbabu": [{"ft_part": "head"}, {"ft_part": "body"}],
    "fedamp": [{"decay_every": 1, "sigma": 1e5}],
    "scaffold": [{"global_lr": 1.5}],
    "pfedme": [{"beta": 0.7}],
}
# What cc204e1 kept in a state and this version does not: round counters, random numbers, another copy of the model.
FORGOTTEN = ("rounds", "draws", "initial")


# Cases whose results intentionally differ from cc204e1, with the reason (CHANGELOG.md announces each).
CHANGED = {
    "fedala partial": "with drop_last, training of the weights no longer drops the incomplete batch",
    "fedfomo full": "the server draws which models it sends",
    "fedfomo partial": "the server draws which models it sends",
    "fedfomo norm": "the server draws which models it sends",
    "fedproto norm": "the test loss is of logits that are distances, not of a linear head",
}


def cases() -> list[tuple[str, str, dict[str, Any]]]:
    """Return method, kind of settings and hyperparameters of every case of the methods in the file."""
    methods = sorted({key.split()[0] for key in json.loads(FILE.read_text(encoding="utf-8"))})
    plain = [(algo, kind, {}) for algo in methods for kind in SETTINGS if algo != "fedbn" or kind == "norm"]
    return plain + [(algo, "full", hyper) for algo, several in VARIANTS.items() for hyper in several]


def name(case: tuple[str, str, dict[str, Any]]) -> str:
    """Return a case's key in the file."""
    algo, kind, hyper = case
    return " ".join([algo, kind, *(f"{k}={v}" for k, v in hyper.items())])


def federation() -> pflbench.Federation:
    """Return four clients of three classes; clients 1 and 3 have no samples of class 2."""
    random = np.random.RandomState(0)
    clients = []
    for i, n in enumerate(SIZES):
        y = np.arange(n + 20) % (3 if i % 2 == 0 else 2)
        x = random.randn(n + 20, 3) + 0.8 * y[:, None] * np.array([1.0, -1.0, 0.5]) * (1 if i % 2 else -1)
        clients.append((x[:n], y[:n], x[n:], y[n:]))
    return pflbench.Federation.from_arrays(clients, classes=3)


def network(kind: str) -> pflbench.Net:
    """Return the network; for "norm" its features together are one channel of a BatchNorm."""
    layers = [nn.Unflatten(1, (1, 3)), nn.BatchNorm1d(1), nn.Flatten()] if kind == "norm" else []
    net = pflbench.Net(nn.Sequential(nn.Linear(3, 3), *layers, nn.Tanh()), nn.Linear(3, 3)).double()
    random = np.random.RandomState(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.from_numpy(random.uniform(-0.6, 0.6, tuple(p.shape))))
    return net


def run(case: tuple[str, str, dict[str, Any]]) -> pflbench.Record:
    """Return the record of a case."""
    algo, kind, hyper = case
    given = {"batch_size": 3, "lr": 0.1, "local_epochs": 2, "join_ratio": 1.0, **SETTINGS[kind]}
    spec = pflbench.RunSpec(algo=algo, hyperparameters=hyper, clients=len(SIZES), **given)
    return pflbench.run(spec, federation(), network(kind), executor="serial")


def leaves(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a state, and its numbers as tensors."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if str(key).split(" ")[0] not in FORGOTTEN:
                yield from leaves(value)
    else:
        yield torch.as_tensor(tree, dtype=torch.float64 if isinstance(tree, int | float) else None).detach()


def states(record: pflbench.Record) -> dict[str, Any]:
    """Return the states by owner."""
    return {"server": record.server, **{str(i): record.client_states[i] for i in range(len(SIZES))}}


def metrics(record: pflbench.Record, digits: int | None = None) -> list[list[Any]]:
    """Return the losses and accuracies of every round."""
    names = ("train_loss", "test_loss", "accuracy", "accuracy_mean", "accuracy_worst10", "global_accuracy")
    evaluations = {row["round"]: row for row in getattr(record, "evaluations", [])}  # at cc204e1, parts of the rounds
    values = [[{**evaluations.get(row["round"], {}), **row}.get(n) for n in names] for row in record.rounds]
    return values if digits is None else [[v if v is None else float(f"{v:.{digits}g}") for v in row] for row in values]


def moments(state: Any) -> dict[str, list[float]]:
    """Return, for each shape, two sums over the tensors of that shape: weighted by place, and squared likewise."""
    sums: dict[str, list[float]] = {}
    for leaf in leaves(state):
        x = leaf.double().flatten()
        weights = torch.cos(1 + torch.arange(len(x), dtype=torch.float64))
        out = sums.setdefault(str(list(leaf.shape)), [0.0, 0.0])
        out[0] += float((x * weights).sum())
        out[1] += float((x * x * weights).sum())
    return {shape: [float(f"{v:.14g}") for v in found] for shape, found in sorted(sums.items())}


def frozen(case: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    """Return what the file holds of a case."""
    record = run(case)
    return {"metrics": metrics(record, 14), **{owner: moments(state) for owner, state in states(record).items()}}


def bits(case: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    """Return the SHA-256 of every state, whatever its layout, and the metrics."""
    record = run(case)
    found: dict[str, Any] = {"metrics": metrics(record)}
    for owner, state in states(record).items():
        each = sorted(
            hashlib.sha256(f"{t.dtype} {tuple(t.shape)}".encode() + t.contiguous().numpy().tobytes()).hexdigest()
            for t in leaves(state)
        )
        found[owner] = hashlib.sha256("".join(each).encode()).hexdigest()
    return found


def write(values: dict[str, Any]) -> None:
    """Write the file, a line per case."""
    lines = [f"{json.dumps(case)}: {json.dumps(value)}" for case, value in values.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main(command: str, folder: str | None = None) -> int:
    """Run one of the commands above."""
    torch.set_num_threads(1)
    if command == "freeze":
        write({name(case): frozen(case) for case in cases()})
        return 0
    if command == "refreeze":
        kept = json.loads(FILE.read_text(encoding="utf-8"))
        write(kept | {name(case): frozen(case) for case in cases() if name(case) in CHANGED})
        return 0
    mine = {name(case): bits(case) for case in cases()}
    if command == "bits":
        print(json.dumps(mine))  # noqa: T201
        return 0
    assert folder is not None
    done = subprocess.run(
        [sys.executable, __file__, "bits"], env=os.environ | {"PYTHONPATH": folder}, check=True, capture_output=True
    )
    theirs = json.loads(done.stdout)
    mine = json.loads(json.dumps(mine))
    for case in sorted({*mine, *theirs}):
        a, b = mine.get(case, {}), theirs.get(case, {})
        if other := [part for part in {**a, **b} if a.get(part) != b.get(part)]:
            print(f"{case}: {', '.join(other)} differ; {CHANGED.get(case, 'UNEXPECTED')}")  # noqa: T201
    equal = sum(mine.get(case) == theirs[case] for case in theirs)
    print(f"{equal} of {len(theirs)} cases have equal bits")  # noqa: T201
    return int(any(mine.get(case) != theirs[case] for case in theirs if case not in CHANGED))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
