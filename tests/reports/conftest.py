"""Records as pflbench writes them, made up: the numbers are chosen, nothing is trained."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pflbench import RunSpec
from pflbench.store import schema

CLIENTS, CLASSES = 10, 4
OLD = Path(__file__).parents[1] / "data" / "schema1"


def sha(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def write_record(
    out, algo="fedavg", *, level=0.5, spread=0.1, evaluations=5, peak=None, hyper=None, edit=None, kind=2, **settings
):
    """Write the record of a run whose clients' accuracies are around `level` in the end; return its folder.

    With `peak` they are highest after that round, and the global model's after the first. `edit` may change what
    run.json holds. `kind` is the record's schema.
    """
    defaults = {"clients": CLIENTS, "dataset": "cifar10", "alpha": 0.1, "rounds": evaluations, "join_ratio": 0.5}
    spec = RunSpec(algo=algo, hyperparameters=hyper or {}, **{**defaults, **settings}).normalised()
    name = spec.run_id({})
    draw = np.random.RandomState(spec.seed)
    n = draw.randint(20, 60, spec.clients)
    rounds, tests, clients = [], [], []
    both = spec.tested == "both"
    for i in range(1, evaluations + 1):
        rise = (i if peak is None else evaluations - abs(peak - i)) / evaluations
        whole = 0.5 if peak is None else 2.0 / i
        own = np.clip(level * rise + spread * draw.randn(spec.clients), 0, 1)
        right = np.round(own * n)
        each = right / n
        rounds.append(
            {
                "round": i, "participants": [0, 1], "train_loss": 1.0 / i, "bytes_up": 1000, "bytes_down": 2000,
                "steps": 7, "forward": 70, "backward": 70, "seconds": 0.5, "busy_seconds": 0.9,
            }
        )  # fmt: skip
        tests.append(
            {
                "round": i, "accuracy": right.sum() / n.sum(), "accuracy_mean": each.mean(),
                "accuracy_std": each.std(), "accuracy_worst10": np.sort(each)[: -(-len(each) // 10)].mean(),
                "global_accuracy": None if algo == "local" else whole * right.sum() / n.sum(), "test_loss": 1.0,
                "steps": 3, "forward": 30, "backward": 30, "seconds": 0.25, "busy_seconds": 0.4,
            }
        )  # fmt: skip
        clients += [
            {"round": i, "client": c, "n": int(n[c]), "accuracy": each[c],
             "global_accuracy": None if algo == "local" else whole * each[c],
             **({"own_accuracy": each[c] / 2} if both else {})}
            for c in range(spec.clients)
        ]  # fmt: skip
    if both:
        for test in tests:
            test |= {f"own_{name}": test[name] / 2 for name in schema.EVALUATION[1:5]}
    if kind == 1:
        rounds = [
            {**row, **{name: value for name, value in test.items() if name not in row}, "seconds": 0.75}
            for row, test in zip(rounds, tests, strict=True)
        ]
        metrics = schema.metrics_fingerprint_1(rounds, clients)
    else:
        metrics = schema.metrics_fingerprint(rounds, tests, clients)
    run = {
        "schema": kind, "id": name, "status": "finished", "reason": None, "summary": {"rounds": len(rounds)},
        "spec": spec.to_dict(),
        "fingerprints": {
            "data": sha(spec.dataset), "partition": sha(spec.dataset, spec.alpha, spec.seed), "initial": sha(spec.seed),
            "algorithm": sha(algo), "metrics": metrics, "states": sha(name),
        },
        "versions": {"python": "3.11.7", "pflbench": "0.1.0", "torch": "2.15.0"},
        "machine": {"system": "Linux", "processor": "one", "cores": 2, "executor": "processes", "workers": 2,
                    "git_commit": None},
    }  # fmt: skip
    if edit is not None:
        edit(run)
    folder = Path(out) / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run))
    for file, rows in (("rounds", rounds), ("evaluations", tests))[:kind]:
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(schema.table(clients, schema.clients_columns(spec)), folder / "clients.parquet")
    samples = [
        {"client": c, "class": k, "train": 3 * (c + k) + 1, "test": c + k}
        for c in range(spec.clients)
        for k in range(CLASSES)
    ]
    pq.write_table(schema.table(samples, schema.SAMPLES), folder / "samples.parquet")
    return folder


@pytest.fixture(scope="session")
def write():
    """Write the record of a run that never was."""
    return write_record


LEVELS = {"fedas": 0.8, "fedavg": 0.4, "fedper": 0.78, "local": 0.7}


@pytest.fixture(scope="session")
def grid(tmp_path_factory):
    """A folder of runs: four methods, two datasets, two alphas, three seeds."""
    out = tmp_path_factory.mktemp("grid") / "runs"
    for algo, level in LEVELS.items():
        for dataset in ("cifar10", "cifar100"):
            for alpha in (0.1, 0.5):
                for seed in range(3):
                    write_record(out, algo, level=level - alpha / 5, dataset=dataset, alpha=alpha, seed=seed)
    return out


@pytest.fixture
def old(tmp_path):
    """A folder with the four runs that cc204e1 recorded, in schema 1: fedas and fedavg, two seeds."""
    return shutil.copytree(OLD, tmp_path / "old")
