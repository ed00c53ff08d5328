import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from pflbench import RunSpec, UsageError
from pflbench import run as compute
from pflbench.reports import frames
from pflbench.reports.frames import client_scores, export, load, scores


def test_a_real_runs_record_is_loaded_as_it_is(tmp_path, toy):
    spec = toy.spec("fedper", {}, rounds=3, eval_every=2, seed=5)
    record = compute(spec, toy.federation(), toy.net(), executor="serial", out=tmp_path)
    runs = load(tmp_path)
    assert runs.left_out.empty
    row = runs.runs.iloc[0]
    assert (row["run"], row["algo"], row["seed"], row["path"]) == (record.id, "fedper", 5, str(record.path))
    assert row["data_fingerprint"] == record.fingerprints["data"]
    assert row["torch_version"] == record.versions["torch"]
    assert list(runs.rounds["round"]) == [1, 2, 3]
    assert runs.rounds["accuracy"].isna().tolist() == [True, False, False]
    assert runs.clients.drop(columns="run").to_dict("records")[0].keys() == record.clients[0].keys()
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
    rows = runs.rounds["accuracy"].to_list()
    assert int(np.argmax(rows)) == 2
    assert int(runs.rounds["global_accuracy"].argmax()) == 0
    assert runs.rounds["global_accuracy"].max() > max(rows)
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
    assert sorted(found) == sorted([["fedas align_lr=0.1", "fedas align_lr=0.2", "fedavg"], *[["fedavg"]] * 5])
    assert table.groupby("protocol")["setting"].nunique().tolist() == [4, 1, 1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("partial", "unfinished; `pflbench run --resume`"),
        ("foreign", "not a record: it has no run.json"),
        ("file", "not a record"),
        ("diverged", "diverged: round 2: client 3"),
        ("schema", "its record schema is 0, not 1"),
        ("source", "had another source than in 2 other runs of fedavg; run it again"),
        ("twice", "the same run as"),
        ("json", "cannot be read"),
        ("rounds", "cannot be read: its files do not belong together"),
        ("clients", "cannot be read"),
        ("no-list", "cannot be read"),
    ],
)
def test_what_cannot_be_used_is_named_with_the_reason_and_the_rest_is_used(write, tmp_path, name, reason):
    good = [write(tmp_path / "runs", seed=seed) for seed in (0, 1)]
    bad = tmp_path / "runs" / name
    edits = {
        "diverged": lambda run: run.update(status="diverged", reason="round 2: client 3: ..."),
        "schema": lambda run: run.update(schema=0),
        "source": lambda run: run["fingerprints"].update(algorithm="0" * 64),
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
    elif name == "rounds":
        text = (bad / "rounds.jsonl").read_text().splitlines()
        (bad / "rounds.jsonl").write_text("\n".join(text[:-1]))
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
    with pytest.raises(UsageError, match="nowhere is not there"):
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
    assert [f.name for f in files] == [f"{name}.{kind}" for name in ("runs", "rounds", "clients")]
    read = {f.stem: (pd.read_csv if kind == "csv" else pd.read_parquet)(f) for f in files}
    assert read["clients"]["accuracy"].tolist() == runs.clients["accuracy"].tolist()
    assert read["rounds"]["run"].tolist() == runs.rounds["run"].tolist()
    assert [json.loads(text) for text in read["runs"]["hyperparameters"]] == runs.runs["hyperparameters"].tolist()
    with pytest.raises(UsageError, match="excel"):
        export(runs, tmp_path, "excel")


def test_no_torch_is_imported(grid, tmp_path):
    code = (
        "import sys; from pathlib import Path; from pflbench.reports import compare, load, report;"
        f"report.write(report.make(load({str(grid)!r})), Path({str(tmp_path / 'report')!r}));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_the_schema_is_the_records():
    from pflbench.store import record

    assert frames.SCHEMA == record.SCHEMA
    assert ("seed", *(name for name in RunSpec.__dataclass_fields__ if name.endswith("_seed"))) == frames.SEEDS
