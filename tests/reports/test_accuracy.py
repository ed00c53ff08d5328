import numpy as np
import pytest

from pflbench.reports import report
from pflbench.reports.accuracy import Comparisons, accuracy_tables, duels
from pflbench.reports.frames import load, scores


def made(folder, metric="accuracy", selection="last"):
    runs = load(folder)
    return runs, accuracy_tables(runs, metric, selection, Comparisons(runs, metric, selection))


def test_cells_are_mean_and_sample_deviation_over_seeds_of_the_runs_they_name(grid):
    runs, (table,) = made(grid)
    values = scores(runs)
    assert table.rows == ["FedAS", "FedAvg", "FedPer", "Local"]
    assert list(table.columns.values()) == [
        ("cifar10", "α=0.1"), ("cifar10", "α=0.5"), ("cifar100", "α=0.1"), ("cifar100", "α=0.5"),
    ]  # fmt: skip
    assert len(table.cells) == 16
    for (method, setting), cell in table.cells.items():
        own = runs.runs[(runs.runs["method"] == method) & (runs.runs["setting"] == setting)]
        assert sorted(cell.runs) == sorted(own["run"])
        three = values[list(cell.runs)].to_numpy()
        assert len(three) == 3
        assert cell.mean == pytest.approx(three.mean())
        assert cell.std == pytest.approx(np.sqrt(((three - three.mean()) ** 2).sum() / 2))
        assert cell.interval[0] < cell.mean < cell.interval[1]


def test_the_best_of_each_column_is_marked_and_what_is_as_good(write, tmp_path):
    """fedper has fedas's clients but for a sliver now up, now down; fedavg is far below."""
    for seed in range(2):
        write(tmp_path, "fedas", level=0.8, seed=seed)
        write(tmp_path, "fedavg", level=0.4, seed=seed)
        write(tmp_path, "fedper", level=0.8, spread=0.1001, seed=seed)
    _, (table,) = made(tmp_path)
    marks = {method: table.row(method)[0].mark for method in table.rows}
    assert sorted(marks.values()) == ["", "best", "close"] or sorted(marks.values()) == ["", "best", "best"]
    assert marks["FedAvg"] == ""
    assert "Wilcoxon's signed-rank test, one-sided at 5 %" in table.notes[0]
    assert "paired over seeds and clients, with Holm's correction" in table.notes[0]


def test_only_runs_of_one_seed_and_partition_are_pairs(write, tmp_path):
    for seed in range(2):
        write(tmp_path, "fedas", level=0.8, seed=seed)
        write(tmp_path, "fedper", level=0.5, seed=seed + 2)
    runs = load(tmp_path)
    assert Comparisons(runs, "accuracy", "last").better(0, "FedAS", "FedPer") is None
    write(tmp_path, "fedper", level=0.5, seed=0)
    runs = load(tmp_path)
    assert Comparisons(runs, "accuracy", "last").better(0, "FedAS", "FedPer") == pytest.approx(1 / 2**10)
    assert Comparisons(runs, "accuracy_std", "last").better(0, "FedAS", "FedPer") is None


def test_one_protocol_is_one_table_and_a_missing_cell_is_none(write, tmp_path):
    write(tmp_path, "fedavg")
    write(tmp_path, "fedas", dataset="cifar100")
    write(tmp_path, "fedas", lr=0.1)
    _, found = made(tmp_path)
    assert len(found) == 2
    assert "lr 0.005" in found[0].title + found[1].title
    assert "lr 0.1" in found[0].title + found[1].title
    wide = max(found, key=lambda t: len(t.columns))
    assert [[c is None for c in wide.row(m)] for m in wide.rows] == [[True, False], [False, True]]
    assert "Each cell is one seed: it has no standard deviation" in wide.notes[-1]


def test_settings_with_one_label_are_told_apart(write, tmp_path):
    def other(run):
        run["fingerprints"]["data"] = "abcdef" + "0" * 58

    write(tmp_path)
    write(tmp_path, seed=1, edit=other)
    write(tmp_path, min_samples=20)
    _, (table,) = made(tmp_path)
    labels = [kind for _, kind in table.columns.values()]
    assert len(set(labels)) == 3
    assert any("data abcdef" in label for label in labels)
    assert any("min_samples 20" in label for label in labels)


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"alpha": 0.01}, "α=0.01"),
        ({"partition": "iid", "alpha": None}, "iid"),
        ({"partition": "pathological", "alpha": None, "classes_per_client": 3}, "3 classes"),
        ({"balanced": True}, "α=0.1, balanced"),
    ],
)
def test_partitions_have_short_names(write, tmp_path, settings, label):
    write(tmp_path, **settings)
    _, (table,) = made(tmp_path)
    assert list(table.columns.values()) == [("cifar10", label)]


def test_metrics_without_a_value_per_client_are_not_tested_and_the_lowest_deviation_is_best(grid):
    _, (table,) = made(grid, "accuracy_std")
    own = {m: table.row(m)[0].mean for m in table.rows}
    assert [m for m in table.rows if table.row(m)[0].mark == "best"] == [min(own, key=own.get)]
    assert {c.mark for c in table.cells.values()} == {"best", ""}
    assert "no test compares the methods client by client" in table.notes[0]


def test_local_has_no_global_model_and_its_cells_are_missing(grid):
    _, (table,) = made(grid, "global_accuracy")
    assert table.row("Local") == [None] * 4
    assert all(table.row("FedAvg"))


def test_wins_and_losses_mirror_each_other(grid):
    runs, (table,) = made(grid)
    matrix = duels(table, Comparisons(runs, "accuracy", "last"))
    assert matrix.counts["FedAS", "FedAvg"] == (4, 0, 0)
    assert matrix.text("FedAS", "FedAS") == ""
    for (a, b), counts in matrix.counts.items():
        assert counts == matrix.counts[b, a][::-1]
        assert sum(counts) == 4
    assert "each client has" in duels(table, Comparisons(runs, "accuracy_std", "last"))


def test_too_few_runs_have_no_matrix(write, tmp_path):
    write(tmp_path, "fedas")
    write(tmp_path, "fedavg", seed=1)
    runs, (table,) = made(tmp_path)
    assert "no runs can be compared in pairs" in duels(table, Comparisons(runs, "accuracy", "last"))


def test_runs_of_different_sources_have_rows_of_their_own_and_all_are_used(write, tmp_path):
    """Two runs of an older source and one that was mended: no majority decides."""

    def mended(run):
        run["fingerprints"]["algorithm"] = "abcdef" + "0" * 58

    older = [write(tmp_path, "fedas", level=0.8, seed=seed) for seed in (0, 1)]
    newer = write(tmp_path, "fedas", level=0.5, seed=2, edit=mended)
    write(tmp_path, "local", seed=0)
    runs, (table,) = made(tmp_path)
    assert runs.left_out.empty
    first = runs.runs.set_index("run")["algorithm_fingerprint"][older[0].name][:6]
    rows = [f"FedAS (source {first})", "FedAS (source abcdef)"]
    assert table.rows == [*sorted(rows), "Local"]
    cells = {method: table.row(method)[0] for method in rows}
    assert [sorted(cells[method].runs) for method in rows] == [sorted(path.name for path in older), [newer.name]]
    assert cells[rows[1]].mean == scores(runs)[newer.name]
    (note,) = (note for note in table.notes if "source" in note)
    assert note.startswith("Runs of FedAS have different sources")
    assert "Nothing is averaged over sources" in note


def test_runs_of_one_source_have_no_note_on_sources(grid):
    _, (table,) = made(grid)
    assert not [note for note in table.notes if "source" in note]


def test_a_table_of_runs_from_several_devices_says_so(write, tmp_path):
    def on_gpu(run):
        run["machine"] = {"device": {"type": "cuda", "name": "NVIDIA H100", "count": 1}}

    write(tmp_path, "fedas", seed=0)
    write(tmp_path, "fedas", seed=1, edit=on_gpu)
    write(tmp_path, "local", seed=0, clients=20)
    _, tables = made(tmp_path)
    notes = [[note for note in table.notes if "devices" in note] for table in tables]
    kinds = "cpu (1 runs), cuda NVIDIA H100 (1 runs)"
    text = f"Several kinds of devices computed these runs: {kinds}. They differ in rounding."
    assert sorted(notes) == [[], [text]]


def test_who_leads_is_said_in_words_with_the_gap_and_whether_it_is_significant(write, tmp_path):
    for seed in (0, 1):
        for algo, level in (("fedas", 0.8), ("fedper", 0.5)):
            write(tmp_path, algo, level=level, seed=seed)
    write(tmp_path, "fedas", alpha=0.5)
    write(tmp_path, "fedas", alpha=1.0, level=0.5)
    write(tmp_path, "fedper", alpha=1.0, level=0.5)
    made = report.make(load(tmp_path))
    (table,) = made.tables
    means = {labels[1]: [table.cells.get((m, s)) for m in table.rows] for s, labels in table.columns.items()}
    first, second = (100 * cell.mean for cell in means["α=0.1"])
    assert made.leaders[0] == (
        f"cifar10, α=0.1: FedAS leads with {first:.2f} %, {first - second:.2f} points ahead of FedPer (significant)."
    )
    assert made.leaders[1] == "cifar10, α=0.5: only FedAS has runs."
    assert made.leaders[2].endswith("%, 0.00 points ahead of FedPer (a tie, one seed).")
    std = report.make(load(tmp_path), "accuracy_std")
    assert "has the lowest value," in std.leaders[0]
    assert std.leaders[0].endswith("(not tested).")


def test_methods_with_too_few_clients_for_a_test_are_said_to_have_too_few(write, tmp_path):
    for algo, level in (("fedas", 0.8), ("fedper", 0.5)):
        write(tmp_path, algo, level=level, clients=4)
    (why,) = report.make(load(tmp_path)).duels.values()
    assert why == "In all settings fewer than 6 pairs of any two methods differ, too few for a test."
