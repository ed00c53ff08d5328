"""What is written is read back; what has changed since is refused."""

import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pflbench import RunSpec, UsageError
from pflbench.core import registry
from pflbench.store import schema


def known(spec):
    """The hyperparameters of the run's method."""
    return registry.describe(spec.algo).hyperparameters


OLD = Path(__file__).parents[1] / "data" / "schema1"
NUMBERS = st.floats(allow_nan=False)
COUNTS = st.integers(0, 2**31 - 1)


def write(folder, rounds, evaluations, clients, samples, *, spec, **changes):
    """Write a record of schema 2; `changes` replace values of run.json."""
    run = {
        "schema": 2, "id": spec.run_id(known(spec)), "status": "finished", "reason": None,
        "summary": {"rounds": len(rounds)}, "spec": spec.to_dict(), "versions": {}, "machine": {},
        "fingerprints": {"data": "d", "partition": "p", "algorithm": "a",
                         "metrics": schema.metrics_fingerprint(rounds, evaluations, clients)},
        **changes,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    for name, rows in (("rounds", rounds), ("evaluations", evaluations)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rows, columns in (("clients", clients, schema.CLIENTS), ("samples", samples, schema.SAMPLES)):
        pq.write_table(schema.table(rows, columns), folder / f"{name}.parquet")


def row(**values):
    return st.fixed_dictionaries(values)


@st.composite
def records(draw):
    """The spec and the rows of a record, of any numbers that its columns can hold."""
    spec = RunSpec(clients=draw(st.integers(1, 3)), join_ratio=1.0, seed=draw(COUNTS)).normalised()
    passes, times = dict.fromkeys(schema.PASSES, COUNTS), dict.fromkeys(schema.TIMES, NUMBERS)
    maybe = st.none() | NUMBERS
    training = row(
        round=COUNTS, participants=st.lists(COUNTS, max_size=3), train_loss=maybe, bytes_up=COUNTS, bytes_down=COUNTS,
        **passes, **times,
    )  # fmt: skip
    measured = dict.fromkeys(schema.METRICS, NUMBERS) | {"global_accuracy": maybe, "test_loss": maybe}
    evaluations = draw(st.lists(row(round=COUNTS, **measured, **passes, **times), max_size=3))
    count = spec.clients * len(evaluations)
    client = row(round=COUNTS, client=COUNTS, n=COUNTS, accuracy=NUMBERS, global_accuracy=maybe)
    return {
        "spec": spec,
        "rounds": draw(st.lists(training, min_size=1, max_size=3)),
        "evaluations": evaluations,
        "clients": draw(st.lists(client, min_size=count, max_size=count)),
        "samples": draw(st.lists(row(**dict.fromkeys(schema.SAMPLES, COUNTS)), max_size=3)),
    }


def contents(found):
    return {
        "spec": found.spec, "rounds": found.rounds, "evaluations": found.evaluations,
        "clients": found.clients.to_pylist(), "samples": found.samples.to_pylist(),
    }  # fmt: skip


@settings(deadline=None)
@given(record=records())
def test_what_is_written_is_read_back(record):
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), **record)
        found = schema.read(Path(name))
    assert contents(found) == record
    assert found.run["id"] == record["spec"].run_id(known(record["spec"]))


@pytest.mark.parametrize("name", ["rounds.jsonl", "evaluations.jsonl"])
@settings(max_examples=200, deadline=None)
@given(record=records(), data=st.data())
def test_a_changed_byte_is_refused_unless_it_changes_only_spaces_or_times(name, record, data):
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), **record)
        file = Path(folder) / name
        text = bytearray(file.read_bytes())
        assume(text)
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(text)
        try:
            found = contents(schema.read(Path(folder)))
        except UsageError:
            return
    for rows in (found["rounds"], found["evaluations"], record["rounds"], record["evaluations"]):
        for one in rows:
            del one["seconds"], one["busy_seconds"]
    assert found == record


@settings(deadline=None)
@given(record=records(), data=st.data())
def test_a_changed_value_of_a_client_is_refused(record, data):
    assume(record["clients"])
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), **record)
        clients = [dict(one) for one in record["clients"]]
        one = data.draw(st.sampled_from(clients))
        column = data.draw(st.sampled_from(list(schema.CLIENTS)))
        value = data.draw(COUNTS if schema.CLIENTS[column] == "int32" else NUMBERS)
        assume(json.dumps(value) != json.dumps(one[column]))
        one[column] = value
        pq.write_table(schema.table(clients, schema.CLIENTS), Path(name) / "clients.parquet")
        with pytest.raises(UsageError, match="its files do not belong together or are damaged"):
            schema.read(Path(name))


@pytest.mark.parametrize("folder", sorted(OLD.iterdir()), ids=lambda folder: folder.name)
def test_a_record_of_schema_1_is_read_in_the_shape_of_schema_2(folder):
    found = schema.read(folder)
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert found.run["schema"] == 1
    assert found.spec.run_id(known(found.spec)) == found.run["id"] == folder.name
    assert [tuple(one) for one in found.rounds] == [schema.ROUND] * 2
    assert [tuple(one) for one in found.evaluations] == [schema.EVALUATION] * 2
    for line, training, evaluation in zip(lines, found.rounds, found.evaluations, strict=True):
        assert line == {**{k: v for k, v in evaluation.items() if v is not None or k in line}, **training}
        assert {evaluation[name] for name in (*schema.PASSES, *schema.TIMES)} == {None}
    assert found.clients.num_rows == 2 * 3
    assert {one["client"] for one in found.samples.to_pylist()} == {0, 1, 2}


def test_rounds_of_schema_1_without_evaluation_have_none(tmp_path):
    """As cc204e1 writes them with `eval_every` 2: the first line has no metrics."""
    (source, *_) = sorted(OLD.iterdir())
    folder = tmp_path / source.name
    shutil.copytree(source, folder)
    first, second = (json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines())
    first = {name: value for name, value in first.items() if name in schema.ROUND}
    (folder / "rounds.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    clients = [one for one in pq.read_table(folder / "clients.parquet").to_pylist() if one["round"] == 2]
    pq.write_table(schema.table(clients, schema.CLIENTS), folder / "clients.parquet")
    run = json.loads((folder / "run.json").read_text())
    run["fingerprints"]["metrics"] = schema.metrics_fingerprint_1([first, second], clients)
    (folder / "run.json").write_text(json.dumps(run))
    found = schema.read(folder)
    assert [one["round"] for one in found.rounds] == [1, 2]
    assert [one["round"] for one in found.evaluations] == [2]


def small():
    """A record of one round and one client."""
    times = {"seconds": 1.5, "busy_seconds": 1.5}
    cost = {"steps": 2, "forward": 8, "backward": 8, **times}
    metrics = dict.fromkeys(schema.METRICS, 0.5)
    return {
        "rounds": [{"round": 1, "participants": [0], "train_loss": 1.0, "bytes_up": 8, "bytes_down": 8, **cost}],
        "evaluations": [{"round": 1, **metrics, "test_loss": None, **cost}],
        "clients": [{"round": 1, "client": 0, "n": 2, "accuracy": 0.5, "global_accuracy": 0.5}],
        "samples": [{"client": 0, "class": 0, "train": 4, "test": 2}],
        "spec": RunSpec(clients=1, join_ratio=1.0).normalised(),
    }


def test_times_have_no_part_in_the_fingerprint():
    record = small()
    before = schema.metrics_fingerprint(record["rounds"], record["evaluations"], record["clients"])
    for part in ("rounds", "evaluations"):
        record[part][0]["seconds"] = 9.0
    assert schema.metrics_fingerprint(record["rounds"], record["evaluations"], record["clients"]) == before
    record["evaluations"][0]["steps"] = 9
    assert schema.metrics_fingerprint(record["rounds"], record["evaluations"], record["clients"]) != before


def edit_run(folder, **changes):
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, **changes}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: edit_run(f, schema=3), "record schema 3 is not 1 or 2; use the pflbench that wrote it"),
        (lambda f: edit_run(f, schema=1), "'accuracy' is missing|do not belong together"),
        (lambda f: edit_run(f, id="0" * 12), "do not belong together"),
        (lambda f: edit_run(f, summary={"rounds": 2}), "do not belong together"),
        (lambda f: edit_run(f, summary={}), "'rounds' is missing"),
        (lambda f: edit_run(f, spec={"lr": -1.0}), r"not a readable record \(lr: -1.0 is out of bounds"),
        (lambda f: edit_run(f, spec={"lrr": 1.0}), "did you mean 'lr'"),
        (lambda f: edit_run(f, fingerprints={}), "'data' is missing"),
        (lambda f: edit_run(f, versions=None), "versions in run.json is None, not a table"),
        (lambda f: (f / "run.json").write_text("[1]"), "not a readable record"),
        (lambda f: (f / "run.json").write_text("{"), "not a readable record"),
        (lambda f: (f / "evaluations.jsonl").unlink(), "No such file"),
        (lambda f: (f / "evaluations.jsonl").write_text(""), "do not belong together"),
        (lambda f: (f / "rounds.jsonl").write_text("5\n"), "not a readable record"),
        (lambda f: (f / "clients.parquet").write_bytes(b"PAR1 and no more"), "clients.parquet: "),
        (lambda f: (f / "samples.parquet").write_bytes(b""), "samples.parquet: "),
        (lambda f: shutil.copy(f / "samples.parquet", f / "clients.parquet"), "clients.parquet: "),
    ],
)
def test_a_damaged_record_is_refused_in_one_line(tmp_path, damage, reason):
    write(tmp_path, **small())
    schema.read(tmp_path)
    damage(tmp_path)
    with pytest.raises(UsageError, match=reason) as caught:
        schema.read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["rounds", "evaluations"])
def test_a_line_without_a_column_is_refused(tmp_path, part):
    record = small()
    del record[part][0]["seconds"]
    write(tmp_path, **record)
    with pytest.raises(UsageError, match="'seconds' is missing"):
        schema.read(tmp_path)


def test_a_diverged_run_without_any_evaluation_is_read(tmp_path):
    record = small() | {"evaluations": [], "clients": []}
    write(tmp_path, **record, status="diverged", reason="round 2: client 0: ...")
    assert schema.read(tmp_path).run["status"] == "diverged"


def test_infinite_numbers_are_read_back(tmp_path):
    record = small()
    record["evaluations"][0]["test_loss"] = math.inf
    write(tmp_path, **record)
    assert schema.read(tmp_path).evaluations[0]["test_loss"] == math.inf


def test_the_seeds_are_the_specs():
    assert schema.SEEDS == ("seed", "partition_seed", "init_seed", "sampling_seed", "order_seed")


def test_neither_torch_nor_pandas_nor_pyarrow_is_imported(tmp_path):
    code = "import sys, pflbench.store.schema; print({'torch', 'pandas', 'pyarrow'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
