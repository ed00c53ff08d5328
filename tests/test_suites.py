"""The ready suites: their runs, and the published figures that they hold."""

import json
import tomllib

import pytest

from pflbench.core import registry
from pflbench.sweep.suite import Suite, suites

RUNS = {
    "quick": 36, "fedas-table2": 120, "fedas-table3": 120, "fedas-table4": 16, "pfllib-alpha": 20,
    "pfllib-leaderboard": 28,
}  # fmt: skip
PFLLIB_ONLY = {"fedcp", "gpfl", "feddbe"}


def read(name):
    path = suites()[name]
    return Suite.from_toml(tomllib.loads(path.read_text(encoding="utf-8")), path)


def test_every_ready_suite_is_known_here():
    assert suites().keys() == RUNS.keys()


@pytest.mark.parametrize(("name", "runs"), RUNS.items())
def test_a_ready_suite_describes_its_runs_each_once(name, runs):
    specs = read(name).specs()
    assert len({json.dumps(s.normalised().to_dict()) for s in specs}) == len(specs) == runs
    for spec in specs:
        registry.make(spec.algo, spec.hyperparameters)
    assert {s.seed for s in specs} == ({0, 1, 2} if name == "quick" else {0})
    assert ("seed" in read(name).grid) == (name == "quick")


@pytest.mark.parametrize("name", sorted(RUNS.keys() - {"quick"}))
def test_every_published_figure_belongs_to_one_run_and_every_run_has_a_figure(name):
    suite = read(name)
    cells = [
        (f.algo, json.dumps(f.hyperparameters), *(f.where[name] for name in suite.published.columns))
        for f in suite.published.figures
        if f.algo not in PFLLIB_ONLY
    ]
    runs = [
        (s.algo, json.dumps(s.hyperparameters), *(getattr(s, name) for name in suite.published.columns))
        for s in suite.specs()
    ]
    assert sorted(cells) == sorted(runs)
    for key, value in suite.published.base.items():
        assert {getattr(s, key) for s in suite.specs()} == {value}


@pytest.mark.parametrize("name", ["fedas-table2", "fedas-table3", "fedas-table4"])
def test_the_suites_of_fedas_have_its_published_settings(name):
    for spec in read(name).specs():
        assert (spec.clients, spec.rounds, spec.local_epochs, spec.batch_size, spec.lr) == (20, 40, 5, 16, 0.005)
        assert (spec.momentum, spec.weight_decay, spec.lr_decay, spec.split) == (0.0, 0.0, 1.0, "pooled")
        assert (spec.eval_every, spec.tested) == (10, "both")
        assert spec.hyperparameters.get("mu", 0.1) == 0.1
        assert ("mu" in spec.hyperparameters) == (spec.algo == "fedprox")


def table(name):
    """The figures in percent, by row (our id, the source's name) and by column."""
    found = {}
    for f in read(name).published.figures:
        found.setdefault((f.algo, f.name), {})[tuple(f.where.values())] = round(100 * f.value, 2)
    return found


# The sums of the ten figures of each column, in the order of the paper: a slip in one figure changes a sum.
SUMS = {
    "fedas-table2": [394.46, 445.51, 471.78, 489.9, 314.98, 351.55, 368.03, 377.53, 282.76, 312.48, 321.04, 327.8],
    "fedas-table3": [790.38, 838.45, 867.68, 881.57, 715.0, 755.84, 773.65, 783.57, 684.79, 707.95, 723.06, 729.76],
}


@pytest.mark.parametrize(("name", "sums"), SUMS.items())
def test_the_columns_of_a_table_have_the_papers_sums(name, sums):
    rows = table(name)
    assert len(rows) == 10
    columns = [(alpha, join) for alpha in (0.1, 0.3, 0.5) for join in (0.2, 0.4, 0.6, 1.0)]
    assert [round(sum(row[column] for row in rows.values()), 2) for column in columns] == sums


def test_the_rows_of_a_table_are_the_papers():
    assert table("fedas-table2")["fedas", None][0.1, 0.2] == 52.41
    assert table("fedas-table2")["fedavg", "FedAvg-P"][0.5, 1.0] == 33.82
    assert table("fedas-table2")["fedbabu", None][0.1, 0.2] == round(52.41 - 2.56, 2)
    assert table("fedas-table3")["fedas", None][0.1, 0.6] == 90.81
    assert table("fedas-table3")["fedprox", "FedProx-P"][0.3, 0.4] == 67.50


def test_the_ablation_begins_with_fedper_and_ends_with_fedas():
    parts, methods = table("fedas-table4"), table("fedas-table3")
    joins = (0.2, 0.4, 0.6, 1.0)
    assert [name for _, name in parts] == ["neither", "alignment alone", "Fisher weights alone", "both"]
    assert [parts["fedas", "neither"][j,] for j in joins] == [methods["fedper", None][0.1, j] for j in joins]
    assert [parts["fedas", "both"][j,] for j in joins] == [methods["fedas", None][0.1, j] for j in joins]
    switches = [f.hyperparameters for f in read("fedas-table4").published.figures[::4]]
    assert switches == [
        {"alignment": "off", "weighting": "samples"}, {"weighting": "samples"}, {"alignment": "off"}, {},
    ]  # fmt: skip
    assert round(sum(value for row in parts.values() for value in row.values()), 2) == 1436.23


def test_where_the_published_code_tests_own_models_of_participants_alone_the_figure_is_held_against_the_mixture():
    for name in ("fedas-table2", "fedas-table3", "fedas-table4"):
        for figure in read(name).published.figures:
            mixed = figure.algo in ("fedavg", "fedprox", "fedper", "lg-fedavg", "fedpac")
            assert figure.metric == ("mixed_accuracy" if mixed else "accuracy")
            assert figure.selection == "last"
            assert figure.why.endswith(".")
            assert "\n" not in figure.why


def test_the_leaderboards_share_a_column_and_are_of_the_best_round():
    whole, alphas = table("pfllib-leaderboard"), table("pfllib-alpha")
    assert len(whole) == 17
    for (algo, name), row in alphas.items():
        assert row[0.1,] == whole[algo, name]["cifar100",]
    for name in ("pfllib-leaderboard", "pfllib-alpha"):
        assert {figure.selection for figure in read(name).published.figures} == {"best-test"}
    assert round(sum(row["fashion-mnist",] for row in whole.values()), 2) == 1631.39
    assert round(sum(row["cifar100",] for row in whole.values()), 2) == 850.6
