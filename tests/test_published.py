"""Published figures: what the table [published] of a suite means, and what it must not hold."""

import copy
import dataclasses
import tomllib
from pathlib import Path

import pytest
from refusals import refusal

from pflbench import UsageError, published, reports
from pflbench.published import Published
from pflbench.reports import metrics
from pflbench.sweep.suite import Suite

TOML = """
[base]
dataset = "cifar10"
alpha = 0.7
rounds = 40
set = { mu = 1 }

[grid]
join-ratio = [0.2, 1]

[published]
source = "A: B, C 2024, Table 2"
columns = { alpha = [0.1, 1], join-ratio = [0.2, 0.4, 1.0] }

[[published.row]]
algo = "fedavg"
name = "FedAvg-P"
percent = [10, 20.5, 30, 40, 50, 100]
metric = "own_accuracy"
selection = "best-test"
why = "It is."

[[published.row]]
algo = "fedcp"
set = { align-lr = 0.1 }
percent = [1, 2, 3, 4, 5, 0]
"""


def read(change=lambda tables: None):
    tables = copy.deepcopy(tomllib.loads(TOML))
    change(tables)
    return Suite.from_toml(tables, Path("suite.toml")).published


def test_a_row_has_a_figure_for_each_combination_and_the_last_column_varies_fastest():
    found = read()
    assert (found.source, found.columns) == ("A: B, C 2024, Table 2", ("alpha", "join_ratio"))
    cells = [(figure.where["alpha"], figure.where["join_ratio"], figure.value) for figure in found.figures[:6]]
    assert cells == [
        (0.1, 0.2, 0.1),
        (0.1, 0.4, 0.205),
        (0.1, 1.0, 0.3),
        (1.0, 0.2, 0.4),
        (1.0, 0.4, 0.5),
        (1.0, 1.0, 1.0),
    ]
    assert all(isinstance(value, float) for cell in cells for value in cell)
    assert [figure.value for figure in found.figures[6:]] == [0.01, 0.02, 0.03, 0.04, 0.05, 0.0]


def test_a_row_says_what_it_is_held_against_and_its_defaults_are_the_last_accuracy():
    first, *_, last = read().figures
    assert (first.algo, first.name, first.hyperparameters) == ("fedavg", "FedAvg-P", {"mu": 1})
    assert (first.metric, first.selection, first.why) == ("own_accuracy", "best-test", "It is.")
    assert (last.algo, last.name, last.hyperparameters) == ("fedcp", None, {"mu": 1, "align_lr": 0.1})
    assert (last.metric, last.selection, last.why) == ("accuracy", "last", None)


def test_the_base_has_what_all_figures_share():
    assert read().base == {"dataset": "cifar10", "rounds": 40}


def test_published_figures_do_not_change_and_a_suite_may_have_none():
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().source = "me"
    assert read(lambda t: t.pop("published")) is None


def row(**changes):
    return lambda tables: tables["published"]["row"][0].update(changes)


def columns(**found):
    return lambda tables: tables["published"].update(columns=found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (row(percent=[1, 2]), "suite.toml: published, row 1 (fedavg): percent has 2 figures, and the columns have 6"),
        (row(percent=[1, 2, 3, 4, 5, 100.5]), "percent: 100.5 is not a number from 0 to 100"),
        (row(percent=[1, 2, 3, 4, 5, -1]), "percent: -1 is not a number"),
        (row(percent=[1, 2, 3, 4, 5, float("nan")]), "percent: nan is not a number"),
        (row(percent=[1, 2, 3, 4, 5, True]), "percent: True is not a number"),
        (row(percent=[1, 2, 3, 4, 5, "6"]), "percent: '6' is not a number"),
        (row(percent=1), "row 1 (fedavg): percent must be a list, not 1"),
        (row(persent=[1]), "unknown key in suite.toml: published, row 1 'persent'; did you mean 'percent'?"),
        (row(metric=["accuracy"]), "metric must be text, not ['accuracy']"),
        (row(set="mu"), "set must be a table, not 'mu'"),
        (lambda t: t["published"]["row"][0].pop("algo"), "row 1: algo is missing"),
        (lambda t: t["published"]["row"][0].pop("percent"), "row 1 (fedavg): percent is missing"),
        (lambda t: t["published"].update(row=[3]), "row 1: 3 is not a table"),
        (lambda t: t["published"].pop("source"), "suite.toml: published: source is missing"),
        (lambda t: t["published"].update(colums={}), "unknown key in suite.toml: published 'colums'; did you mean"),
        (columns(alhpa=[0.1]), "unknown setting 'alhpa'; did you mean 'alpha'?"),
        (columns(alpha=[0.1, -1]), "alpha: -1.0 is out of bounds"),
        (columns(alpha=0.1), "column alpha must be a list of values"),
        (columns(alpha=[]), "column alpha must be a list of values"),
        (lambda t: t.update(published=[]), "suite.toml: published must be a table, [published]"),
        (lambda t: t["base"].update(ronds=3), "unknown setting 'ronds'; did you mean 'rounds'?"),
    ],
)  # fmt: skip
def test_what_no_table_of_a_paper_can_be_is_one_clear_line(change, message):
    assert message in refusal(read, change)


def test_the_metrics_and_selections_are_those_of_a_report():
    assert set(published.METRICS) == set(metrics.METRICS)
    assert set(published.SELECTIONS) == set(reports.SELECTIONS)


def test_the_columns_values_are_checked_and_not_the_defaults():
    """0.1, the default join ratio, would leave none of 5 clients."""
    values = {"source": "s", "columns": {"join_ratio": [0.4]}, "row": [{"algo": "fedavg", "percent": [50]}]}
    found = Published.from_toml(values, {"clients": 5}, Path("suite.toml"), algorithm={"fedavg": {"lr": 0.1}})
    assert found.base == {"clients": 5}
    assert found.figures[0].settings == {"lr": 0.1}


@pytest.mark.parametrize(
    ("key", "value", "hint"), [("metric", "own_acuracy", "own_accuracy"), ("selection", "best", "")]
)
def test_an_unknown_metric_or_selection_is_refused_when_the_suite_is_read(key, value, hint):
    row = {"algo": "fedavg", "percent": [50], key: value}
    values = {"source": "s", "columns": {"alpha": [0.4]}, "row": [row]}
    with pytest.raises(
        UsageError, match=rf"unknown {key} in suite.toml: published, row 1 \(fedavg\) '{value}'.*{hint}"
    ):
        Published.from_toml(values, {}, Path("suite.toml"))
