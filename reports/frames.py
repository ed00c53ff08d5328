"""Records on disk as tidy tables. What cannot be used is named, with the reason, and left out."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pflbench.errors import UsageError, unknown

SCHEMA = 1
METRICS = {
    "accuracy": "accuracy, weighted by test samples",
    "accuracy_mean": "accuracy, plain mean of the clients",
    "accuracy_worst10": "accuracy of the worst 10 % of the clients",
    "accuracy_std": "standard deviation of accuracy over the clients",
    "global_accuracy": "accuracy of the global model, weighted by test samples",
}
SELECTIONS = {
    "last": "after the last round",
    "last5": "mean of the last five evaluations",
    "best-test": "best round on the TEST data: an optimistic number, no fair comparison",
}
SEEDS = ("seed", "partition_seed", "init_seed", "sampling_seed", "order_seed")
COLUMNS = ("dataset", "partition", "alpha", "classes_per_client", "balanced", "min_samples")
"""Settings that a table shows as columns: runs that differ in them are of one protocol."""
_CLIENTS = pa.schema(
    [(name, pa.int32()) for name in ("round", "client", "n")]
    + [(name, pa.float64()) for name in ("accuracy", "global_accuracy")]
)
_NO_FOLDERS = ("tensorboard",)  # what pflbench itself puts beside the runs


@dataclass(frozen=True)
class Runs:
    """Finished runs, as tidy tables.

    `runs` has a row per run: `run` (its id), every setting of its spec, `method` (its name, with the hyperparameters
    that differ among the runs of that method), `protocol` and `setting` (numbers), fingerprints and versions, the costs
    in all (`bytes_up`, `bytes_down`, `seconds`), and `path`. Runs of one `setting` differ in method, hyperparameters
    and seeds only; settings of one `protocol` differ in dataset and partition.
    `rounds` has a row per round, `clients` one per client and evaluation; both name the `run`. Accuracies are
    fractions.
    `left_out` has `path` and `reason` of what was found and not used.
    """

    runs: pd.DataFrame
    rounds: pd.DataFrame
    clients: pd.DataFrame
    left_out: pd.DataFrame

    def settings(self) -> "pd.DataFrame":
        """Return a row for each setting, the index its number: the settings of its runs, without what they vary in."""
        return (
            self.runs.drop(columns=["method", *_no_setting(self.runs)])
            .drop_duplicates("setting")
            .set_index("setting")
            .sort_index()
        )


def load(*paths: Path | str) -> Runs:
    """Return the records in `paths`: run folders, or folders of them.

    Raises `UsageError` when a path is not there.
    """
    found: dict[str, _Read] = {}
    left_out: list[tuple[str, str]] = []
    for path in _folders(paths):
        try:
            read = _read(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            left_out.append((str(path), text if isinstance(error, _LeftOutError) else f"cannot be read: {text}"))
            continue
        run = read[0]["run"]
        if run in found:
            left_out.append((str(path), f"the same run as {found[run][0]['path']}"))
        else:
            found[run] = read
    for name, where, reason in _of_other_sources([run for run, _, _ in found.values()]):
        del found[name]
        left_out.append((where, reason))
    table = pd.DataFrame([run for run, _, _ in found.values()])
    # One frame out of many lists, since a frame for each run would take longer than all the reading.
    rounds = pd.DataFrame([{**row, "run": run} for run, (_, rows, _) in found.items() for row in rows])
    clients = pa.concat_tables([tested for _, _, tested in found.values()]).to_pandas() if found else pd.DataFrame()
    if found:
        clients["run"] = [run for run, (_, _, tested) in found.items() for _ in range(len(tested))]
    return Runs(
        _with_settings(table) if len(table) else table,
        rounds,
        clients,
        pd.DataFrame(left_out, columns=["path", "reason"]),
    )


def scores(runs: Runs, metric: str = "accuracy", selection: str = "last") -> "pd.Series[float]":
    """Return `metric` of every run, by run id, selected by the rule `selection`. NaN where it is not defined.

    Raises `UsageError` for an unknown name.
    """
    _check(metric, selection)
    chosen = _selected(runs.rounds, runs.rounds.dropna(subset=["accuracy"]), selection)
    return chosen.groupby("run")[metric].mean().astype(float)


def client_scores(runs: Runs, metric: str = "accuracy", selection: str = "last") -> pd.DataFrame:
    """Return `metric`, "accuracy" or "global_accuracy", of every client: a row per run, a column per client.

    Raises `UsageError` for an unknown name.
    """
    _check(metric, selection)
    chosen = _selected(runs.rounds, runs.clients, selection)
    return chosen.pivot_table(index="run", columns="client", values=metric, aggfunc="mean", dropna=False)


def export(runs: Runs, out: Path, kind: str) -> list[Path]:
    """Write the tables of `runs` to `out` as "csv" or "parquet"; return the files.

    Raises `UsageError` for another kind, and when there is no run.
    """
    if kind not in ("csv", "parquet"):
        raise unknown("format", kind, ("csv", "parquet"))
    if runs.runs.empty:
        raise UsageError("runs: there is no finished run to export; run `pflbench sweep quick` first")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name in ("runs", "rounds", "clients"):
        table: pd.DataFrame = getattr(runs, name)
        lists = [column for column in ("hyperparameters", "participants") if column in table]
        plain = table.assign(**{column: table[column].map(json.dumps) for column in lists})
        files.append(out / f"{name}.{kind}")
        if kind == "csv":
            plain.to_csv(files[-1], index=False)
        else:
            plain.to_parquet(files[-1], index=False)
    return files


def _check(metric: str, selection: str) -> None:
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if selection not in SELECTIONS:
        raise unknown("selection", selection, SELECTIONS)


def _selected(rounds: pd.DataFrame, rows: pd.DataFrame, selection: str) -> pd.DataFrame:
    """Return those of `rows` whose rounds the rule `selection` selects."""
    tested = rounds.dropna(subset=["accuracy"]).sort_values(["run", "round"])
    groups = tested.groupby("run")
    if selection == "best-test":
        kept = tested.loc[groups["accuracy"].idxmax()]
    else:
        kept = groups.tail(1 if selection == "last" else 5)
    return rows.merge(kept[["run", "round"]], on=["run", "round"])


class _LeftOutError(ValueError):
    """Why a record that can be read is not used."""


def _folders(paths: Iterable[Path | str]) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UsageError(f"runs: {path} is not there; `pflbench run` and `pflbench sweep` write records")
        inside = [path] if (path / "run.json").exists() or not path.is_dir() else sorted(path.iterdir())
        found += [p for p in inside if not p.name.startswith(".") and p.name not in _NO_FOLDERS]
    return found


_Read = tuple[dict[str, Any], list[dict[str, Any]], pa.Table]


def _read(path: Path) -> _Read:
    if path.suffix == ".partial":
        raise _LeftOutError("unfinished; `pflbench run --resume`, or its sweep, goes on with it")
    if path.suffix == ".old":
        raise _LeftOutError("left behind when the run was computed anew; it can be deleted")
    if not (path / "run.json").is_file():
        raise _LeftOutError("not a record: it has no run.json")
    run = json.loads((path / "run.json").read_text(encoding="utf-8"))
    if run["schema"] != SCHEMA:
        raise _LeftOutError(f"its record schema is {run['schema']}, not {SCHEMA}")
    if run["status"] != "finished":
        raise _LeftOutError(f"{run['status']}: {run['reason']}")
    lines = (path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    clients = pq.ParquetFile(path / "clients.parquet").read(_CLIENTS.names).cast(_CLIENTS)
    tested = sum("accuracy" in row for row in rows)
    if len(rows) != run["summary"]["rounds"] or len(clients) != tested * run["spec"]["clients"]:
        raise ValueError("its files do not belong together or are damaged")
    costs = {name: sum(row[name] for row in rows) for name in ("bytes_up", "bytes_down", "seconds")}
    return {
        "run": run["id"],
        **run["spec"],
        **{f"{name}_fingerprint": value for name, value in run["fingerprints"].items()},
        **{f"{name}_version": value for name, value in run["versions"].items()},
        **costs,
        "path": str(path),
    }, rows, clients  # fmt: skip


def _of_other_sources(runs: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return id, path and reason of the runs whose method's source is not that of most runs of the method."""
    out = []
    for algo in {run["algo"] for run in runs}:
        own = [run for run in runs if run["algo"] == algo]
        count = Counter(run["algorithm_fingerprint"] for run in own)
        usual, most = count.most_common(1)[0]
        for run in own:
            if run["algorithm_fingerprint"] != usual:
                reason = f"{algo}, or pflbench, had another source than in {most} other runs of {algo}; run it again"
                out.append((run["run"], run["path"], reason))
    return out


def _no_setting(table: pd.DataFrame) -> list[str]:
    """Return the columns of `Runs.runs` in which runs of one setting may differ."""
    apart = ("run", "algo", "hyperparameters", "path", *SEEDS, "bytes_up", "bytes_down", "seconds")
    found = [str(column) for column in table]
    return [c for c in found if c in apart or c.endswith(("_fingerprint", "_version"))]


def _with_settings(table: pd.DataFrame) -> pd.DataFrame:
    """Return `table` with the columns `method`, `protocol` and `setting`."""
    varying: dict[str, list[str]] = {}
    for algo, group in table.groupby("algo"):
        names = sorted({name for h in group["hyperparameters"] for name in h})
        varying[str(algo)] = [n for n in names if len({json.dumps(h.get(n)) for h in group["hyperparameters"]}) > 1]

    def method(row: "pd.Series[Any]") -> str:
        return " ".join([row["algo"], *(f"{n}={row['hyperparameters'].get(n)}" for n in varying[row["algo"]])])

    spec = [str(c) for c in table.columns.drop(_no_setting(table))]
    numbers = [c for c in COLUMNS if c not in ("dataset", "partition")]
    order = table.assign(**{c: pd.to_numeric(table[c], errors="coerce") for c in numbers})
    table = table.loc[order.sort_values([*COLUMNS, "algo", "seed"]).index].reset_index(drop=True)
    protocol = table[[c for c in spec if c not in COLUMNS]].apply(lambda row: json.dumps(row.tolist()), axis=1)
    setting = table[spec].apply(lambda row: json.dumps(row.tolist()), axis=1) + table["data_fingerprint"]
    numbered = {"protocol": pd.factorize(protocol)[0], "setting": pd.factorize(setting)[0]}
    return table.assign(method=table.apply(method, axis=1), **numbered)
