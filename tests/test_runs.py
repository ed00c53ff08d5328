"""`pflbench runs`, and runs that are named by their ids."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from pflbench.cli import main
from pflbench.spec import RunSpec
from pflbench.store import listing


def put(out, algo="fedavg", *, status="finished", accuracy=0.5, hyper=None, kind=2, **settings):
    """Write a run's folder with nothing but run.json; return its id."""
    spec = RunSpec(algo=algo, hyperparameters=hyper or {}, dataset="cifar10", **settings).normalised()
    run = spec.run_id({})
    summary = {"rounds": spec.rounds, "last": {"accuracy": accuracy}} if status == "finished" else {"rounds": 3}
    reason = None if status == "finished" else "round 4: client 1: the loss is nan; lower lr"
    record = {
        "schema": kind, "id": run, "status": status, "reason": reason, "summary": summary, "spec": spec.to_dict(),
    }  # fmt: skip
    (out / run).mkdir(parents=True)
    (out / run / "run.json").write_text(json.dumps(record))
    return run


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; return its exit code and what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["pflbench", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "runs"


def rows(text):
    """The cells of the printed table, by id."""
    lines = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {row[0]: row[1:] for row in cells if len(row) == 7}


def test_runs_are_listed_with_what_they_are_and_what_differs(call, out):
    first = put(out, join_ratio=0.2, seed=3, accuracy=0.876543)
    other = put(out, "fedas", alpha=1.0, status="diverged", hyper={"align_lr": 0.2})
    third = put(out, "fedas", alpha=1.0, hyper={"align_lr": 0.1})
    iid = put(out, partition="iid", lr=0.1)
    (out / "0123456789ab.partial" / "checkpoint").mkdir(parents=True)
    for number in ("000002", "000012", "000007"):
        (out / "0123456789ab.partial" / "checkpoint" / f"{number}.json").touch()
    (out / ".locks").mkdir()
    (out / "tensorboard").mkdir()
    code, text, err = call("runs")
    assert (code, err) == (0, "")
    found = rows(text)
    assert found.pop("id") == ["status", "method", "setting", "seed", "rounds", "accuracy"]
    place, lr = "cifar10: 20 clients, dirichlet", "lr 0.005"
    assert found == {
        first: ["finished", "fedavg", f"{place} 0.1, join ratio 0.2, balanced False, {lr}", "3", "40/40", "87.65 %"],
        other: ["diverged", "fedas", f"{place} 1, join ratio 0.1, balanced False, {lr}, align_lr 0.2", "0", "3/40",
                "-"],
        third: ["finished", "fedas", f"{place} 1, join ratio 0.1, balanced False, {lr}, align_lr 0.1", "0", "40/40",
                "50.00 %"],
        iid: ["finished", "fedavg", "cifar10: 20 clients, iid, join ratio 0.1, balanced True, lr 0.1", "0", "40/40",
              "50.00 %"],
        "0123456789ab": ["unfinished", "-", "-", "-", "12", "-"],
    }  # fmt: skip
    assert list(found) == [first, third, other, iid, "0123456789ab"]  # by settings; what is not known comes last
    assert text.splitlines()[-1] == "5 runs: 3 finished, 1 diverged, 1 unfinished"


def test_runs_are_listed_as_json(call, out):
    run = put(out, status="diverged")
    (out / "0123456789ab.partial").mkdir()
    code, text, err = call("runs", "--json", str(out))
    assert (code, err) == (0, "")
    first, second = json.loads(text)
    assert first == {
        "id": run, "path": str(out / run), "status": "diverged", "rounds": 3, "accuracy": None,
        "reason": "round 4: client 1: the loss is nan; lower lr",
        "spec": json.loads((out / run / "run.json").read_text())["spec"],
    }  # fmt: skip
    assert (second["id"], second["status"], second["spec"], second["rounds"]) == ("0123456789ab", "unfinished", None, 0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "Expecting"), ("[1]", "list indices"), ('{"schema": 9}', "record schema 9"), ('{"schema": 2}', "'id'")],
)
def test_a_record_that_cannot_be_read_is_listed_as_such(out, text, reason):
    put(out)
    (out / "dead").mkdir()
    (out / "dead" / "run.json").write_text(text)
    entry = listing.entries([out])[-1]
    assert (entry.id, entry.status, entry.spec) == ("dead", "unreadable", None)
    assert reason in entry.reason


def test_records_of_schema_1_and_replaced_records_are_listed(out, call):
    old = Path(__file__).parent / "data" / "schema1"
    found = listing.entries([old])
    assert [(e.spec.algo, e.status, e.rounds) for e in found] == [
        ("fedas", "finished", 2), ("fedas", "finished", 2), ("fedavg", "finished", 2), ("fedavg", "finished", 2),
    ]  # fmt: skip
    assert all(0 < e.accuracy < 1 for e in found)
    run = put(out)
    shutil.copytree(out / run, out / f"{run}.old")
    assert [(e.id, e.status) for e in listing.entries([out])] == [(run, "finished"), (run, "replaced")]


def test_no_runs_are_no_error_and_no_folder_is(call, out):
    assert call("runs") == (
        2, "", "Error: runs: runs does not exist; `pflbench run` and `pflbench sweep` write records\n"
    )  # fmt: skip
    out.mkdir()
    assert call("runs") == (0, "0 runs\n", "")


def test_five_hundred_runs_are_listed_from_run_json_alone_and_fast(call, out):
    for seed in range(500):
        put(out, seed=seed)
    begin = time.monotonic()
    code, text, _ = call("runs")
    assert time.monotonic() - begin < 5
    assert (code, text.splitlines()[-1]) == (0, "500 runs: 500 finished")


@pytest.fixture
def three(out):
    """Runs whose ids are chosen: two begin alike, and one of them has an interrupted repetition."""
    made = out / put(out)
    for name in ("abcd11112222", "abcd33334444", "ffff00001111"):
        shutil.copytree(made, out / name)
    shutil.rmtree(made)
    (out / "abcd33334444.partial").mkdir()
    (out / "eeee00001111.partial").mkdir()
    return out


@pytest.mark.parametrize(
    ("text", "folder"),
    [("abcd11112222", "abcd11112222"), ("abcd1", "abcd11112222"), ("ffff", "ffff00001111"),
     ("abcd3333", "abcd33334444"), ("eeee", "eeee00001111.partial")],
)  # fmt: skip
def test_a_run_is_found_by_its_id_or_the_beginning_of_it(three, text, folder):
    assert listing.find(text, three) == three / folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abcd", "'abcd' begins several ids: abcd11112222, abcd33334444; give more characters"),
        ("fff", "'fff' is no folder, and no id of a run in runs (or its first 4); it has abcd11112222, abcd33334444, "
                "eeee00001111, ffff00001111"),
        ("abce", "'abce' is no folder, and no id of a run in runs"),
        ("nowhere/abcd", "nowhere/abcd does not exist"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["runs", "report", "export"])
def test_a_run_that_is_not_there_is_one_line_with_what_is_there(call, three, command, text, message):
    code, printed, err = call(command, text)
    assert (code, printed) == (2, "")
    assert err.startswith("Error: runs: ")
    assert message in err
    assert err.count("\n") == 1


def test_many_ids_are_not_all_named(out):
    for seed in range(7):
        put(out, seed=seed)
    with pytest.raises(Exception, match=r"it has (\w{12}, ){4}\w{12} and 2 more \(see `pflbench runs`\)"):
        listing.find("none", out)


def test_a_path_goes_before_an_id(call, three, tmp_path):
    (tmp_path / "ffff").mkdir()
    assert call("runs", "ffff")[1] == "0 runs\n"


def test_an_unfinished_run_that_is_named_is_left_out_with_the_reason(call, three):
    code, _, err = call("report", "eeee")
    assert code == 2
    assert "left out runs/eeee00001111.partial: unfinished; `pflbench run --resume`" in err
