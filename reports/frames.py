"""Records on disk as tidy tables. Records that cannot be used are left out, and listed with the reason."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from pflbench.core import registry
from pflbench.errors import UsageError, unknown
from pflbench.settings import fields, kind
from pflbench.spec import RunSpec
from pflbench.store import schema
from pflbench.store.schema import SEEDS, Contents, RecordError

from .metrics import METRICS, tested, with_mixed
from .narrow import Where, narrow

SELECTIONS = {
    "last": "after the last round",
    "last5": "mean of the last five evaluations",
    "best-test": "best round on the TEST data: an optimistic number, no fair comparison",
}
PARTITION = ("partition", "alpha", "classes_per_client", "balanced", "min_samples")
"""The settings that make one column of a table: "partition", or "alpha"."""
COSTS = ("bytes_up", "bytes_down", "seconds", "evaluation_seconds")
TABLES = ("runs", "rounds", "evaluations", "clients")


@dataclass(frozen=True)
class Runs:
    """Finished runs, as tidy tables.

    `runs` has a row per run: `run` (its id), the `schema` of its record, the `device`, every setting of its spec
    (`algo` is the method's id), `method` (the paper's name of the method, with its source and those hyperparameters in
    which runs of the method differ), `protocol` and `setting` (numbers), fingerprints and versions, the total costs
    (`COSTS`), and `path`. Runs of one `setting` differ only in method, hyperparameters and seeds; settings of one
    `protocol` differ only in the settings that a table shows as `columns`, outer heads first: "partition" stands for
    all of `PARTITION`. `rounds` has a row per round of training, `evaluations` one per evaluation, `clients` one per
    client and evaluation; all have the column `run`. Accuracies are fractions. In `runs` and `rounds`, `seconds` are of
    training; in records of schema 1 they contain the evaluations, whose seconds are unknown (NaN).
    `left_out` has `path` and `reason` of each record that was found but not used.
    """

    runs: pd.DataFrame
    rounds: pd.DataFrame
    evaluations: pd.DataFrame
    clients: pd.DataFrame
    left_out: pd.DataFrame
    columns: tuple[str, ...]

    def settings(self) -> "pd.DataFrame":
        """Return a row for each setting, indexed by its number, with the values that all its runs share."""
        return (
            self.runs.drop(columns=["method", *_no_setting(self.runs)])
            .drop_duplicates("setting")
            .set_index("setting")
            .sort_index()
        )


def load(*paths: Path | str, columns: Iterable[str] | None = None, where: Where | None = None) -> Runs:
    """Return the records in `paths`: run folders, or folders of them.

    `columns` names the settings that a table shows as columns, outer heads first; "alpha" is the whole partition. By
    default these are dataset and partition, and the join ratio if runs differ in it and in no other setting.

    Only one of two records of the same run is used, unless they have different sources: then both are used, and the
    first six digits of its source's fingerprint are appended to the second one's id. A record that also has the
    clients' own models replaces a record of the same run without them.
    With `where`, only runs with these settings are used: {"dataset": ["cifar100"], "alpha": [0.1, 0.5]}.
    Raises `UsageError` when a path does not exist, for an unknown setting, and when `where` leaves no run.
    """
    chosen = None if columns is None else _columns(columns)
    found: dict[str, tuple[Path, Contents]] = {}
    left_out: list[tuple[str, str]] = []
    for path in schema.folders(paths):
        try:
            contents = _finished(path)
        except RecordError as error:
            left_out.append((str(path), error.reason))
            continue
        except _LeftOutError as error:
            left_out.append((str(path), str(error)))
            continue
        name = _name(contents, found)
        if name in found:
            left_out.append((str(path), f"the same run as {found[name][0]}"))
        else:
            found[name] = path, contents
    if where and found:
        found = {name: found[name] for name in narrow({n: c.spec for n, (_, c) in found.items()}, where)}
    for name in _repeated(found):
        path, _ = found.pop(name)
        left_out.append((str(path), "the same run as one that also tests the clients' own models"))
    table = pd.DataFrame([_row(name, path, contents) for name, (path, contents) in found.items()])
    # Each table is made as one frame: a frame for each run would take longer than reading all records.
    rounds = [{"run": name, **row} for name, (_, contents) in found.items() for row in contents.rounds]
    evaluations = [{"run": name, **row} for name, (_, contents) in found.items() for row in contents.evaluations]
    tables = [schema.table([], schema.OWN_CLIENTS), *(contents.clients for _, contents in found.values())]
    clients = pa.concat_tables(tables, promote_options="default").to_pandas()
    clients["run"] = [name for name, (_, contents) in found.items() for _ in range(len(contents.clients))]
    chosen = chosen or _default_columns(table)
    of_rounds = pd.DataFrame(rounds, columns=["run", *schema.ROUND])
    tested = pd.DataFrame(evaluations, columns=["run", *schema.EVALUATION, *schema.OWN]).astype(
        # Unknown values must not change the type of a column to object.
        dict.fromkeys((*schema.METRICS, "test_loss", *schema.TIMES), float) | dict.fromkeys(schema.PASSES, "Int64")
    )
    tested, clients = with_mixed(of_rounds, tested, clients)
    left = pd.DataFrame(left_out, columns=["path", "reason"])
    return Runs(_with_settings(table, chosen) if len(table) else table, of_rounds, tested, clients, left, chosen)


def scores(runs: Runs, metric: str = "accuracy", selection: str = "last") -> "pd.Series[float]":
    """Return `metric` of every run, by run id, selected by the rule `selection`; NaN if it is not defined.

    Raises `UsageError` for an unknown name.
    """
    _check(metric, selection)
    found = _selected(runs, runs.evaluations, metric, selection).groupby("run")[metric].mean()
    return found if runs.runs.empty else found.reindex(sorted(runs.runs["run"]))


def client_scores(runs: Runs, metric: str = "accuracy", selection: str = "last") -> pd.DataFrame:
    """Return `metric` of every client, a column of `Runs.clients`: a row per run, a column per client.

    Raises `UsageError` for an unknown name.
    """
    _check(metric, selection)
    chosen = _selected(runs, runs.clients, metric, selection)
    return chosen.pivot_table(index="run", columns="client", values=metric, aggfunc="mean", dropna=False)


def titles(algos: Iterable[str]) -> dict[str, str]:
    """Return the paper's name of each method by its id. If methods share a name, their ids are appended."""
    found = {algo: registry.title(algo) for algo in algos}
    count = Counter(found.values())
    return {algo: title if count[title] == 1 else f"{title} ({algo})" for algo, title in found.items()}


def in_order(methods: Iterable[str]) -> list[str]:
    """Return the names of methods in the order of tables and plots: alphabetical."""
    return sorted(methods, key=lambda method: (method.casefold(), method))


def export(runs: Runs, out: Path, kind: str) -> list[Path]:
    """Write the tables of `runs` to `out` as "csv" or "parquet"; return the files.

    The table of runs also has every metric: that of the last evaluation has the metric's name, and that of the best
    round on test ends in "_best_test".
    Raises `UsageError` for another kind, and when there is no run.
    """
    if kind not in ("csv", "parquet"):
        raise unknown("format", kind, ("csv", "parquet"))
    if runs.runs.empty:
        raise UsageError("runs: there is no finished run to export; run `pflbench sweep quick` first")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name in TABLES:
        table: pd.DataFrame = getattr(runs, name)
        if name == "runs":
            table = table.assign(**_accuracies(runs))
        lists = [column for column in ("hyperparameters", "participants") if column in table]
        plain = table.assign(**{column: table[column].map(json.dumps) for column in lists})
        files.append(out / f"{name}.{kind}")
        if kind == "csv":
            plain.to_csv(files[-1], index=False)
        else:
            plain.to_parquet(files[-1], index=False)
    return files


def _accuracies(runs: Runs) -> "dict[str, pd.Series[float]]":
    """Return every metric of every run, in the order of `runs.runs`, after the last and at the best round on test."""
    ends = {"": "last", "_best_test": "best-test"}
    return {
        f"{metric}{end}": runs.runs["run"].map(scores(runs, metric, selection))
        for end, selection in ends.items()
        for metric in METRICS
    }


def _check(metric: str, selection: str) -> None:
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if selection not in SELECTIONS:
        raise unknown("selection", selection, SELECTIONS)


def _selected(runs: Runs, rows: pd.DataFrame, metric: str, selection: str) -> pd.DataFrame:
    """Return the `rows` of the evaluations that the rule `selection` selects.

    The best round on test is that of the tested models, for example of the clients' own models for their metrics.
    """
    evaluations = runs.evaluations.sort_values(["run", "round"])
    groups = evaluations.groupby("run")
    if selection == "best-test":
        of = tested(metric)
        chosen = evaluations.loc[evaluations.dropna(subset=of).groupby("run")[of].idxmax()]
    else:
        chosen = groups.tail(1 if selection == "last" else 5)
    return rows.merge(chosen[["run", "round"]], on=["run", "round"])


class _LeftOutError(Exception):
    """The reason why a folder, or a readable record, is not used."""


def _finished(path: Path) -> Contents:
    """Return the contents of the record in folder `path`. Raises `RecordError` or `_LeftOutError` if it is not used."""
    if path.suffix == ".partial":
        raise _LeftOutError("unfinished; `pflbench run --resume`, or its sweep, continues it")
    if path.suffix == ".old":
        raise _LeftOutError("replaced by a newer record of the same run; you can delete it")
    if not (path / "run.json").is_file():
        raise _LeftOutError("not a record: it has no run.json")
    contents = schema.read(path)
    if contents.run["status"] != "finished":
        raise _LeftOutError(f"{contents.run['status']}: {contents.run['reason']}")
    return contents


def _name(contents: Contents, found: dict[str, tuple[Path, Contents]]) -> str:
    """Return a run's name among those `found`: its id, for a second source of the same run with six more digits."""
    run, source = contents.run["id"], contents.run["fingerprints"]["algorithm"]
    if run in found and found[run][1].run["fingerprints"]["algorithm"] != source:
        return f"{run}-{source[:6]}"
    return str(run)


def _repeated(found: dict[str, tuple[Path, Contents]]) -> list[str]:
    """Return the names of the runs that another run repeats with the clients' own models."""
    both = set()
    for _, contents in found.values():
        if contents.spec.tested == "both":
            run = dataclasses.replace(contents.spec, tested="deployed").run_id(
                schema.hyperparameters(contents.spec.algo)
            )
            both.add((run, contents.run["fingerprints"]["algorithm"]))
    return [
        name
        for name, (_, contents) in found.items()
        if (contents.run["id"], contents.run["fingerprints"]["algorithm"]) in both
    ]


def _row(name: str, path: Path, contents: Contents) -> dict[str, Any]:
    run = contents.run
    # With the user's federation, one fingerprint covers both data and partition.
    fingerprints = {"partition": run["fingerprints"]["data"], **run["fingerprints"]}
    evaluating = [row["seconds"] for row in contents.evaluations]
    return {
        "run": name,
        "schema": run["schema"],
        "device": _device(run["machine"]),
        **contents.spec.to_dict(),
        **{f"{name}_fingerprint": value for name, value in fingerprints.items()},
        **{f"{name}_version": value for name, value in run["versions"].items()},
        **{name: sum(row[name] for row in contents.rounds) for name in (*schema.BYTES, "seconds")},
        "evaluation_seconds": float("nan") if None in evaluating else sum(evaluating),
        "path": str(path),
    }


def _device(machine: Mapping[str, Any]) -> str:
    """Return the type and the name of the devices that computed a run; records before 0.2 know only the CPU."""
    device = machine.get("device", {})
    return " ".join(str(device[name]) for name in ("type", "name") if name in device) or "cpu"


def _no_setting(table: pd.DataFrame) -> list[str]:
    """Return the columns of `Runs.runs` in which runs of one setting may differ."""
    excluded = ("run", "schema", "device", "algo", "hyperparameters", "tested", "path", *SEEDS, *COSTS)
    found = [str(column) for column in table]
    return [c for c in found if c in excluded or c.endswith(("_fingerprint", "_version"))]


def _columns(names: Iterable[str]) -> tuple[str, ...]:
    """Return the columns of tables, each once. Raises `UsageError` for a name that is no setting of a run."""
    known = [n for n in fields(RunSpec) if n not in ("algo", "tested", *SEEDS)]
    found = []
    for name in (name.replace("-", "_") for name in names):
        if name not in known:
            raise unknown("column", name, known)
        found.append("partition" if name in PARTITION else name)
    return tuple(dict.fromkeys(found))


def _default_columns(table: pd.DataFrame) -> tuple[str, ...]:
    """Return dataset and partition, and the join ratio if runs differ in it and in no other setting."""
    columns: tuple[str, ...] = ("dataset", "partition")
    if len(table):
        rest = _joined(table, [c for c in _spec(table) if c not in (*covered(columns), "join_ratio")])
        if table.groupby(rest)["join_ratio"].nunique().max() > 1:
            columns = (*columns, "join_ratio")
    return columns


def covered(columns: Iterable[str]) -> list[str]:
    """Return the settings that the `columns` of a table stand for."""
    return [name for column in columns for name in (PARTITION if column == "partition" else (column,))]


def _spec(table: pd.DataFrame) -> list[str]:
    return [str(c) for c in table.columns.drop(_no_setting(table))]


def _joined(table: pd.DataFrame, columns: Iterable[str]) -> "pd.Series[str]":
    """Return the values of `columns` in each row as one text."""
    return table[list(columns)].apply(lambda row: json.dumps(row.tolist()), axis=1)


def _with_settings(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return `table`, in the order of `columns`, with the columns `method`, `protocol` and `setting`."""
    spec = _spec(table)
    first = list(dict.fromkeys([*covered(columns), *covered(("dataset", "partition"))]))
    numbers = [c for c in first if c not in ("dataset", "partition") and kind(RunSpec, c)[0] is not str]
    order = table.assign(**{c: pd.to_numeric(table[c], errors="coerce") for c in numbers})
    table = table.loc[order.sort_values([*first, "algo", "seed"]).index].reset_index(drop=True)
    protocol = _joined(table, [c for c in spec if c not in covered(columns)])
    setting = _joined(table, spec) + table["data_fingerprint"]
    numbered = {"protocol": pd.factorize(protocol)[0], "setting": pd.factorize(setting)[0]}
    return table.assign(method=_methods(table), **numbered)


def _methods(table: pd.DataFrame) -> "pd.Series[str]":
    """Return the name of each run's method.

    Runs of different hyperparameters or different sources get different names, so nothing is averaged over them.
    """
    title = titles(table["algo"].unique())
    varying: dict[str, list[str]] = {}
    for algo, group in table.groupby("algo"):
        names = sorted({name for h in group["hyperparameters"] for name in h})
        varying[str(algo)] = [n for n in names if len({json.dumps(h.get(n)) for h in group["hyperparameters"]}) > 1]
    sources = table.groupby("algo")["algorithm_fingerprint"].nunique()

    def method(row: "pd.Series[Any]") -> str:
        algo, hyperparameters = row["algo"], row["hyperparameters"]
        parts = [title[algo], *(f"{name}={hyperparameters.get(name)}" for name in varying[algo])]
        if sources[algo] > 1:
            parts.append(f"(source {row['algorithm_fingerprint'][:6]})")
        return " ".join(parts)

    return table.apply(method, axis=1)
