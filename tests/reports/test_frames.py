import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import toy

from pflbench import Record, RunSpec, UsageError
from pflbench import run as compute
from pflbench.core import registry
from pflbench.reports.frames import client_scores, export, load, scores, titles
from pflbench.store import schema


def test_a_real_runs_record_is_loaded_as_it_is(tmp_path):
    spec = toy.spec("fedper", {}, rounds=3, eval_every=2, seed=5)
    record = compute(spec, toy.federation(), toy.net(), executor="serial", out=tmp_path)
    runs = load(tmp_path)
    assert runs.left_out.empty
    row = runs.runs.iloc[0]
    assert (row["run"], row["algo"], row["seed"], row["path"]) == (record.id, "fedper", 5, str(record.path))
    assert row["data_fingerprint"] == record.fingerprints["data"]
    assert row["torch_version"] == record.versions["torch"]
    assert list(runs.rounds["round"]) == [1, 2, 3]
    assert list(runs.evaluations["round"]) == [2, 3]
    assert runs.evaluations["accuracy"].notna().all()
    assert set(runs.clients) == {"run", "own_accuracy", "mixed_accuracy", *record.clients[0]}
    assert runs.clients["accuracy"].tolist() == [c["accuracy"] for c in record.clients]
    assert scores(runs)[record.id] == record.summary["last"]["accuracy"]
    assert scores(runs, "accuracy_worst10", "last5")[record.id] == pytest.approx(
        record.summary["last5"]["accuracy_worst10"]
    )
    assert scores(runs, selection="best-test")[record.id] == record.summary["best_on_test"]["accuracy"]
    assert scores(runs, "global_accuracy").isna().all()


def test_selection_rules_select_rounds(write, tmp_path):
    write(tmp_path, evaluations=7, level=0.4, spread=0.02, peak=3)
    runs = load(tmp_path)
    rows = runs.evaluations["accuracy"].to_list()
    assert int(np.argmax(rows)) == 2
    assert int(runs.evaluations["global_accuracy"].argmax()) == 0
    assert runs.evaluations["global_accuracy"].max() > max(rows)
    assert scores(runs).iloc[0] == rows[-1]
    assert scores(runs, selection="last5").iloc[0] == pytest.approx(np.mean(rows[-5:]))
    assert scores(runs, selection="best-test").iloc[0] == max(rows)
    own = runs.clients[runs.clients["client"] == 3].sort_values("round")
    assert client_scores(runs).loc[:, 3].iloc[0] == own["accuracy"].iloc[-1]
    assert client_scores(runs, selection="last5").loc[:, 3].iloc[0] == pytest.approx(own["accuracy"].iloc[-5:].mean())
    assert client_scores(runs, selection="best-test").loc[:, 3].iloc[0] == own["accuracy"].iloc[2]
    assert client_scores(runs, "global_accuracy").loc[:, 3].iloc[0] == own["global_accuracy"].iloc[-1]


def test_settings_and_protocols_are_told_apart_by_everything_but_method_hyperparameters_and_seeds(write, tmp_path):
    for settings in (
        {"algo": "fedavg"}, {"algo": "fedas", "hyper": {"align_lr": 0.1}},
        {"algo": "fedas", "hyper": {"align_lr": 0.2}, "seed": 1},
        {"alpha": 0.5}, {"dataset": "cifar100"}, {"lr": 0.1}, {"join_ratio": 0.2, "order_seed": 3},
    ):  # fmt: skip
        write(tmp_path, **settings)

    def other_data(run):
        run["fingerprints"]["data"] = "f" * 64

    write(tmp_path, seed=9, edit=other_data)
    table = load(tmp_path).runs
    found = table.sort_values(["setting", "method"]).groupby("setting")["method"].apply(list).to_list()
    assert sorted(found) == sorted([["FedAS align_lr=0.1", "FedAS align_lr=0.2", "FedAvg"], *[["FedAvg"]] * 5])
    assert table.groupby("protocol")["setting"].nunique().tolist() == [5, 1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("partial", "unfinished; `pflbench run --resume`"),
        ("foreign", "not a record: it has no run.json"),
        ("file", "not a record"),
        ("diverged", "diverged: round 2: client 3"),
        ("schema", "record schema 0 is not 1 or 2"),
        ("twice", "the same run as"),
        ("json", "not a readable record"),
        ("rounds", "not a readable record (its files do not belong together"),
        ("evaluations", "not a readable record (its files do not belong together"),
        ("clients", "not a readable record (clients.parquet: "),
        ("no-list", "not a readable record"),
    ],
)
def test_what_cannot_be_used_is_named_with_the_reason_and_the_rest_is_used(write, tmp_path, name, reason):
    good = [write(tmp_path / "runs", seed=seed) for seed in (0, 1)]
    bad = tmp_path / "runs" / name
    edits = {
        "diverged": lambda run: run.update(status="diverged", reason="round 2: client 3: ..."),
        "schema": lambda run: run.update(schema=0),
    }
    made = write(tmp_path / "other", seed=0 if name == "twice" else 7, edit=edits.get(name))
    if name == "partial":
        bad = bad.with_suffix(".partial")
    if name == "foreign":
        bad.mkdir()
    elif name == "file":
        bad.write_text("hello")
    else:
        made.rename(bad)
    if name == "json":
        (bad / "run.json").write_text("{")
    elif name == "no-list":
        (bad / "run.json").write_text("[1]")
    elif name in ("rounds", "evaluations"):
        text = (bad / f"{name}.jsonl").read_text().splitlines()
        (bad / f"{name}.jsonl").write_text("\n".join(text[:-1]))
    elif name == "clients":
        (bad / "clients.parquet").write_bytes(b"PAR1 and no more")
    runs = load(tmp_path / "runs")
    assert sorted(runs.runs["run"]) == sorted(path.name for path in good)
    ((path, why),) = runs.left_out.itertuples(index=False)
    if name != "twice":  # whichever of the two comes first
        assert path == str(bad)
    assert reason in why


def test_single_runs_and_folders_of_runs_can_be_mixed_and_nothing_there_is_an_error(write, tmp_path):
    one = write(tmp_path / "a", seed=1)
    write(tmp_path / "b", seed=2)
    (tmp_path / "b" / ".locks").mkdir()
    (tmp_path / "b" / "tensorboard").mkdir()
    runs = load(one, tmp_path / "b")
    assert sorted(runs.runs["seed"]) == [1, 2]
    assert runs.left_out.empty
    with pytest.raises(UsageError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")


def test_unknown_names_are_refused_with_a_suggestion(grid):
    runs = load(grid)
    with pytest.raises(UsageError, match="did you mean 'accuracy_mean'"):
        scores(runs, "acuracy_mean")
    with pytest.raises(UsageError, match="did you mean 'last5'"):
        client_scores(runs, selection="lst5")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_what_is_exported_is_what_was_loaded(grid, tmp_path, kind):
    runs = load(grid)
    files = export(runs, tmp_path / "out", kind)
    assert [f.name for f in files] == [f"{name}.{kind}" for name in ("runs", "rounds", "evaluations", "clients")]
    read = {f.stem: (pd.read_csv if kind == "csv" else pd.read_parquet)(f) for f in files}
    assert read["clients"]["accuracy"].tolist() == runs.clients["accuracy"].tolist()
    assert read["rounds"]["run"].tolist() == runs.rounds["run"].tolist()
    assert read["evaluations"]["accuracy_worst10"].tolist() == runs.evaluations["accuracy_worst10"].tolist()
    assert set(read["runs"]["algo"]) == {"fedas", "fedavg", "fedper", "local"}
    assert [json.loads(text) for text in read["runs"]["hyperparameters"]] == runs.runs["hyperparameters"].tolist()
    with pytest.raises(UsageError, match="excel"):
        export(runs, tmp_path, "excel")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_exported_runs_have_their_accuracies(write, tmp_path, kind):
    first = write(tmp_path / "runs", evaluations=7, level=0.4, spread=0.02, peak=3)
    write(tmp_path / "runs", "local", level=0.6)
    runs = load(tmp_path / "runs")
    path = export(runs, tmp_path / "out", kind)[0]
    table = (pd.read_csv if kind == "csv" else pd.read_parquet)(path).set_index("run")
    for metric in ("accuracy", "accuracy_mean", "accuracy_worst10", "accuracy_std", "global_accuracy"):
        for column, selection in ((metric, "last"), (f"{metric}_best_test", "best-test")):
            expected = scores(runs, metric, selection)[table.index].to_numpy()
            np.testing.assert_array_equal(table[column].to_numpy(dtype=float), expected)
    rows = runs.evaluations[runs.evaluations["run"] == first.name]["accuracy"].tolist()
    assert table.loc[first.name, "accuracy"] == rows[-1]
    assert table.loc[first.name, "accuracy_best_test"] == rows[2] > rows[-1]
    assert table["own_accuracy"].isna().all()
    assert "accuracy" not in runs.runs


def test_no_torch_is_imported(write, tmp_path):
    runs = str(write(tmp_path / "runs"))
    code = (
        "import sys; from pathlib import Path; from pflbench.reports import compare, load, report;"
        f"report.write(report.make(load({runs!r})), Path({str(tmp_path / 'report')!r}));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def change_a_client(folder):
    """One client got 1 sample more right."""
    rows = pq.read_table(folder / "clients.parquet").to_pylist()
    rows[-1]["accuracy"] += 1 / rows[-1]["n"]
    pq.write_table(schema.table(rows, schema.CLIENTS), folder / "clients.parquet")


def change_a_round(folder):
    text = (folder / "rounds.jsonl").read_text()
    (folder / "rounds.jsonl").write_text(text.replace('"bytes_up": ', '"bytes_up": 1', 1))


def change_the_id(folder):
    text = (folder / "run.json").read_text()
    (folder / "run.json").write_text(text.replace(f'"id": "{folder.name}"', '"id": "000000000000"'))


@pytest.mark.parametrize("change", [change_a_client, change_a_round, change_the_id])
def test_a_report_refuses_the_records_that_record_load_refuses(old, change):
    folder = min(old.iterdir())
    Record.load(folder)
    assert load(folder).left_out.empty
    change(folder)
    with pytest.raises(UsageError, match="its files do not belong together or are damaged"):
        Record.load(folder)
    runs = load(old)
    assert len(runs.runs) == 3
    assert runs.left_out.to_numpy().tolist() == [
        [str(folder), "not a readable record (its files do not belong together or are damaged)"]
    ]


def test_records_of_schema_1_are_loaded_with_rounds_and_evaluations_apart(old):
    runs = load(old)
    assert runs.left_out.empty
    assert sorted(zip(runs.runs["method"], runs.runs["seed"], strict=True)) == [
        ("FedAS", 0), ("FedAS", 1), ("FedAvg", 0), ("FedAvg", 1),
    ]  # fmt: skip
    assert set(runs.runs["schema"]) == {1}
    assert runs.runs["evaluation_seconds"].isna().all()
    for path in old.iterdir():
        lines = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
        rounds = runs.rounds[runs.rounds["run"] == path.name]
        assert rounds["seconds"].tolist() == [line["seconds"] for line in lines]
        assert "accuracy" not in rounds
        evaluations = runs.evaluations[runs.evaluations["run"] == path.name]
        assert evaluations["accuracy"].tolist() == [line["accuracy"] for line in lines]
        assert evaluations[["seconds", "busy_seconds", "steps", "forward", "backward"]].isna().all(axis=None)
        assert scores(runs)[path.name] == Record.load(path).summary["last"]["accuracy"]


def test_records_of_schema_1_are_exported(old, tmp_path):
    runs = load(old)
    files = export(runs, tmp_path, "parquet")
    read = {f.stem: pd.read_parquet(f) for f in files}
    assert {name: len(table) for name, table in read.items()} == {
        "runs": 4, "rounds": 8, "evaluations": 8, "clients": 24,
    }  # fmt: skip
    assert read["evaluations"]["seconds"].isna().all()
    assert read["runs"]["algo"].tolist() == runs.runs["algo"].tolist()


def test_equal_runs_of_both_schemas_are_one_setting_with_equal_scores(write, tmp_path):
    write(tmp_path / "one", seed=1)
    write(tmp_path / "two", seed=1, kind=1)
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    pd.testing.assert_series_equal(scores(one), scores(two))
    pd.testing.assert_frame_equal(client_scores(one), client_scores(two))
    assert one.runs[["seconds", "evaluation_seconds"]].to_numpy().tolist() == [[2.5, 1.25]]
    assert two.runs["seconds"].tolist() == [3.75]
    write(tmp_path / "two", seed=2)
    assert load(tmp_path / "two").runs["setting"].tolist() == [0, 0]


def test_settings_that_are_younger_than_a_record_have_their_defaults_in_it(write, tmp_path, monkeypatch):
    """A record keeps its place beside newer ones when the specs get another setting."""
    write(tmp_path, seed=0)
    write(tmp_path, seed=1)
    whole = RunSpec.to_dict
    monkeypatch.setattr(RunSpec, "to_dict", lambda spec: {**whole(spec), "younger": 0})
    runs = load(tmp_path)
    assert runs.runs["younger"].tolist() == [0, 0]


def test_the_same_run_of_another_source_is_another_run(write, tmp_path):
    """A run that was mended and computed again stands in another folder than the run before."""

    def mended(run):
        run["fingerprints"]["algorithm"] = "abcdef" + "0" * 58

    before = write(tmp_path / "before", level=0.3)
    after = write(tmp_path / "after", level=0.6, edit=mended)
    write(tmp_path / "again", level=0.6, edit=mended)
    runs = load(tmp_path / "before", tmp_path / "after", tmp_path / "again")
    assert before.name == after.name
    assert runs.runs["run"].tolist() == [before.name, f"{after.name}-abcdef"]
    assert runs.runs["method"].str.match(r"FedAvg \(source [0-9a-f]{6}\)").all()
    assert runs.runs["method"].nunique() == 2
    assert scores(runs)[f"{after.name}-abcdef"] > scores(runs)[before.name]
    assert runs.left_out["reason"].tolist() == [f"the same run as {after}"]


def test_methods_that_share_a_name_keep_their_ids_behind_it(monkeypatch):
    monkeypatch.setattr(registry, "title", lambda algo: "FedAvg" if algo.startswith("fedavg") else algo)
    assert titles(["fedavg", "fedavg2", "mine"]) == {
        "fedavg": "FedAvg (fedavg)", "fedavg2": "FedAvg (fedavg2)", "mine": "mine",
    }  # fmt: skip
