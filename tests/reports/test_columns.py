"""What the columns of a table are: dataset, partition and join ratio, or any other settings."""

import csv
import re

import pytest

from pflbench import UsageError
from pflbench.reports import drawing, load, render
from pflbench.reports import report as reporting
from pflbench.reports.accuracy import Comparisons, accuracy_tables

ALPHAS, RATIOS = (0.1, 0.5), (0.2, 0.4, 1.0)


@pytest.fixture
def factors(write, tmp_path):
    """Two methods in two alphas and three join ratios."""
    for algo, level in (("fedavg", 0.4), ("fedas", 0.6)):
        for alpha in ALPHAS:
            for ratio in RATIOS:
                write(tmp_path / "runs", algo, level=level, alpha=alpha, join_ratio=ratio)
    return tmp_path / "runs"


def tables(runs):
    return accuracy_tables(runs, "accuracy", "last", Comparisons(runs, "accuracy", "last"))


def test_the_join_ratio_is_a_column_where_runs_differ_in_it(factors):
    (table,) = tables(load(factors))
    assert table.levels == ("dataset", "partition", "join_ratio")
    assert list(table.columns.values()) == [("cifar10", f"α={a:g}", f"P={p:g}") for a in ALPHAS for p in RATIOS]
    assert table.heads == [
        [("cifar10", 6)], [("α=0.1", 3), ("α=0.5", 3)], [(f"P={p:g}", 1) for _ in ALPHAS for p in RATIOS],
    ]  # fmt: skip
    assert "join ratio" not in table.title


def test_where_runs_differ_in_more_the_join_ratio_separates_protocols(write, tmp_path):
    write(tmp_path, join_ratio=0.2, lr=0.1)
    write(tmp_path, join_ratio=0.4, lr=0.2)
    one, other = tables(load(tmp_path))
    assert one.levels == other.levels == ("dataset", "partition")
    assert sorted(t.title.partition("join ratio ")[2][:3] for t in (one, other)) == ["0.2", "0.4"]


def test_columns_are_those_that_are_named_in_their_order(factors):
    (table,) = tables(load(factors, columns=["join-ratio", "alpha"]))
    assert table.levels == ("join_ratio", "partition")
    assert list(table.columns.values()) == [(f"P={p:g}", f"α={a:g}") for p in RATIOS for a in ALPHAS]
    assert table.title.startswith("dataset cifar10, clients 10")
    for alpha in tables(load(factors, columns=["join_ratio"])):
        assert list(alpha.columns.values()) == [(f"P={p:g}",) for p in RATIOS]
    assert len(tables(load(factors, columns=["join_ratio"]))) == 2


def test_any_setting_can_be_a_column(write, tmp_path):
    for epochs in (10, 5):
        write(tmp_path, local_epochs=epochs, lr=0.01 * epochs)
    (table,) = tables(load(tmp_path, columns=["local_epochs", "lr"]))
    assert list(table.columns.values()) == [("E=5", "lr 0.05"), ("E=10", "lr 0.1")]


@pytest.mark.parametrize(("name", "hint"), [("join-ration", "join_ratio"), ("algo", ""), ("seed", "")])
def test_a_column_that_is_no_setting_is_refused(factors, name, hint):
    with pytest.raises(UsageError, match=rf"unknown column '{name.replace('-', '_')}'.*{hint}"):
        load(factors, columns=[name])


def test_markdown_has_nested_heads(factors):
    (table,) = tables(load(factors))
    lines = [line for line in render.markdown(table).splitlines() if line.startswith("|")]
    assert lines[0] == "| method | cifar10, α=0.1 |  |  | cifar10, α=0.5 |  |  |"
    assert lines[2] == "|  | *P=0.2* | *P=0.4* | *P=1* | *P=0.2* | *P=0.4* | *P=1* |"
    assert {line.count("|") for line in lines} == {8}


def test_latex_has_nested_heads(factors):
    (table,) = tables(load(factors))
    text = render.latex(table)
    assert r"& \multicolumn{6}{c}{cifar10} \\" in text
    assert r"& \multicolumn{3}{c}{$\alpha$=0.1} & \multicolumn{3}{c}{$\alpha$=0.5} \\" in text
    assert r"\cmidrule(lr){2-4} \cmidrule(lr){5-7}" in text
    assert "method & P=0.2 & P=0.4 & P=1 & P=0.2 & P=0.4 & P=1 \\\\" in text


def test_the_csv_has_a_column_for_each_setting(factors):
    rows = list(csv.DictReader(render.csv_text(tables(load(factors))).splitlines()))
    assert len(rows) == 12
    found = {tuple(row[name] for name in ("dataset", "partition", "join_ratio")) for row in rows}
    assert found == {("cifar10", f"α={a:g}", f"P={p:g}") for a in ALPHAS for p in RATIOS}


def test_the_page_has_nested_heads_and_accuracy_against_both_factors(factors, tmp_path):
    reporting.write(reporting.make(load(factors)), tmp_path / "report")
    plots = {path.stem for path in (tmp_path / "report" / "plots").glob("*.png")}
    assert {name for name in plots if name.startswith("alpha-")} == {"alpha-0-0", "alpha-0-1", "alpha-0-2"}
    assert {name for name in plots if name.startswith("join_ratio-")} == {"join_ratio-0-0", "join_ratio-0-1"}
    page = (tmp_path / "report" / "report.html").read_text()
    spans = re.findall(r'<th scope="colgroup" colspan="(\d)">([^<]+)</th>', page)
    metrics = 5  # the page has a table for each
    assert spans == [("6", "cifar10"), ("3", "α=0.1"), ("3", "α=0.5")] * metrics


def test_a_record_with_own_models_replaces_one_without(write, tmp_path):
    write(tmp_path)
    write(tmp_path, tested="both")
    write(tmp_path, tested="deployed", seed=1)
    runs = load(tmp_path)
    assert sorted(zip(runs.runs["seed"], runs.runs["tested"], strict=True)) == [(0, "both"), (1, "deployed")]
    assert runs.runs["setting"].nunique() == 1
    assert list(runs.left_out["reason"]) == ["the same run as one that also tests the clients' own models"]


def test_a_metric_that_one_protocol_lacks_is_missing_there(write, tmp_path):
    write(tmp_path / "runs", tested="both")
    write(tmp_path / "runs", "local", lr=0.1)  # no global model, no own models
    runs = load(tmp_path / "runs")
    for metric in ("accuracy", "own_accuracy", "mixed_accuracy", "global_accuracy"):
        for selection in ("last", "last5", "best-test"):
            made = reporting.make(runs, metric, selection)
            assert len(made.tables) == 2
            assert all(cell.mean >= 0 for table in made.tables for cell in table.cells.values())
    reporting.write(reporting.make(runs, "own_accuracy", "best-test"), tmp_path / "report")
    assert (tmp_path / "report" / "report.html").exists()


def test_lines_against_a_factor_are_of_settings_that_differ_in_nothing_else(write, tmp_path):
    for ratio in (0.2, 0.4):
        for least in (10, 40):
            write(tmp_path, join_ratio=ratio, min_samples=least, level=0.3 if least == 10 else 0.7)
    made = reporting.make(load(tmp_path))
    lines = [job.arguments[0] for job in drawing.jobs(made) if job.name.startswith("join_ratio-")]
    assert [points["join_ratio"].tolist() for points in lines] == [[0.2, 0.4], [0.2, 0.4]]
    (table,) = made.tables
    assert {label[2] for label in table.columns.values()} == {"P=0.2", "P=0.4"}
    assert {label[1] for label in table.columns.values()} == {"α=0.1, min_samples 10", "α=0.1, min_samples 40"}


def test_records_without_own_models_can_be_chosen_where_both_are(write, tmp_path):
    write(tmp_path, tested="both")
    write(tmp_path, tested="deployed")
    assert list(load(tmp_path, where={"tested": ["deployed"]}).runs["tested"]) == ["deployed"]
    assert len(load(tmp_path, where={"norm": ["none"]}).runs) == 1
