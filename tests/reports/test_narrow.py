import pandas as pd
import pytest

from pflbench import UsageError
from pflbench.reports.frames import client_scores, load, scores


def test_runs_are_selected_by_any_value_of_every_name(grid):
    runs = load(grid, where={"alpha": ["0.10"], "dataset": ["cifar100"], "algo": ["fedas", "fedavg"], "seed": [0, "2"]})
    found = runs.runs[["algo", "dataset", "alpha", "seed"]].to_records(index=False).tolist()
    assert found == [
        (algo, "cifar100", 0.1, seed) for algo in ("fedas", "fedavg") for seed in (0, 2)
    ]  # fmt: skip
    for table in (runs.rounds, runs.evaluations, runs.clients):
        assert set(table["run"]) == set(runs.runs["run"])
    whole = load(grid)
    pd.testing.assert_series_equal(scores(runs), scores(whole)[scores(runs).index])
    assert len(client_scores(runs)) == 4
    assert len(load(grid, where={}).runs) == len(whole.runs) == 48


def test_names_of_methods_and_protocols_are_those_of_the_runs_that_are_left(write, tmp_path):
    """A hyperparameter in which the runs no longer differ is no part of a name."""
    for lr, rate in ((0.1, 0.1), (0.2, 0.2)):
        write(tmp_path, "fedas", lr=lr, hyper={"align_lr": rate})
    assert set(load(tmp_path).runs["method"]) == {"FedAS align_lr=0.1", "FedAS align_lr=0.2"}
    left = load(tmp_path, where={"lr": [0.2]}).runs
    assert left["method"].tolist() == ["FedAS"]
    assert left["protocol"].tolist() == [0]


def test_a_seed_that_follows_from_the_common_seed_and_a_folder_without_its_fingerprint_are_found(write, tmp_path):
    write(tmp_path, dataset="folder:birds@0123456789ab", seed=1)
    write(tmp_path, dataset="folder:birds@0123456789ab", seed=2, partition_seed=1)
    write(tmp_path, dataset="folder:bees@0123456789ab", seed=1)
    for name in ("folder:birds", "folder:birds@0123456789ab"):
        assert load(tmp_path, where={"dataset": [name], "partition_seed": [1]}).runs["seed"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"alhpa": ["0.1"]}, "unknown setting 'alhpa'; did you mean 'alpha'?"),
        ({"algo": ["fedsa"]}, "unknown method 'fedsa'; did you mean 'fedas'?"),
        ({"alpha": ["small"]}, "alpha: 'small' is not a number"),
        ({"alpha": ["5", "0.3"]}, "where: no run has alpha 5.0 or 0.3; the runs have alpha 0.1, 0.5"),
        ({"algo": ["ditto"], "seed": ["1"]},
         "where: no run has algo ditto and seed 1; the runs have algo fedas, fedavg, fedper, local; seed 0, 1, 2"),
    ],
)  # fmt: skip
def test_a_selection_that_leaves_no_run_is_one_line_with_what_is_there(grid, where, message):
    with pytest.raises(UsageError) as caught:
        load(grid, where=where)
    assert str(caught.value) == message
