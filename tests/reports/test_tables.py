import csv
import io
import re
import shutil
import subprocess

import numpy as np
import pytest

from pflbench.reports import accuracy
from pflbench.reports.accuracy import Comparisons, accuracy_tables
from pflbench.reports.frames import load, scores


def made(folder, metric="accuracy", selection="last"):
    runs = load(folder)
    return runs, accuracy_tables(runs, metric, selection, Comparisons(runs, metric, selection))


def test_cells_are_mean_and_sample_deviation_over_seeds_of_the_runs_they_name(grid):
    runs, (table,) = made(grid)
    values = scores(runs)
    assert table.rows == ["fedas", "fedavg", "fedper", "local"]
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
    assert marks["fedavg"] == ""
    assert "Wilcoxon's signed-rank test, one-sided at 5 %" in table.notes[0]
    assert "paired over seeds and clients, with Holm's correction" in table.notes[0]


def test_only_runs_of_one_seed_and_partition_are_pairs(write, tmp_path):
    for seed in range(2):
        write(tmp_path, "fedas", level=0.8, seed=seed)
        write(tmp_path, "fedper", level=0.5, seed=seed + 2)
    runs = load(tmp_path)
    assert Comparisons(runs, "accuracy", "last").better(0, "fedas", "fedper") is None
    write(tmp_path, "fedper", level=0.5, seed=0)
    runs = load(tmp_path)
    assert Comparisons(runs, "accuracy", "last").better(0, "fedas", "fedper") == pytest.approx(1 / 2**10)
    assert Comparisons(runs, "accuracy_std", "last").better(0, "fedas", "fedper") is None


def test_one_protocol_is_one_table_and_a_missing_cell_is_shown_as_missing(write, tmp_path):
    write(tmp_path, "fedavg")
    write(tmp_path, "fedas", dataset="cifar100")
    write(tmp_path, "fedas", lr=0.1)
    _, found = made(tmp_path)
    assert len(found) == 2
    assert "lr 0.005" in found[0].title + found[1].title
    assert "lr 0.1" in found[0].title + found[1].title
    wide = max(found, key=lambda t: len(t.columns))
    assert [[c is None for c in wide.row(m)] for m in wide.rows] == [[True, False], [False, True]]
    text = accuracy.markdown(wide)
    assert text.count("missing") == 2
    assert accuracy.latex(wide).count("--") >= 2
    rows = list(csv.DictReader(io.StringIO(accuracy.csv_text(found))))
    assert [r["seeds"] for r in rows].count("0") == 2
    assert "One seed: there is no standard deviation" in wide.notes[-1]


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
    assert "nothing is compared client by client" in table.notes[0]


def test_local_has_no_global_model_and_its_cells_are_missing(grid):
    _, (table,) = made(grid, "global_accuracy")
    assert table.row("local") == [None] * 4
    assert all(table.row("fedavg"))


def test_selection_by_the_test_data_is_labelled_as_what_it_is(grid):
    _, (table,) = made(grid, selection="best-test")
    assert "best round on the TEST data" in accuracy.markdown(table)
    assert "best round on the TEST data" in accuracy.latex(table)


def test_wins_and_losses_mirror_each_other(grid):
    runs, (table,) = made(grid)
    matrix = accuracy.duels(table, Comparisons(runs, "accuracy", "last"))
    assert matrix.counts["fedas", "fedavg"] == (4, 0, 0)
    assert matrix.text("fedas", "fedas") == ""
    for (a, b), counts in matrix.counts.items():
        assert counts == matrix.counts[b, a][::-1]
        assert sum(counts) == 4
    assert "every client has" in accuracy.duels(table, Comparisons(runs, "accuracy_std", "last"))


def test_too_few_runs_have_no_matrix(write, tmp_path):
    write(tmp_path, "fedas")
    write(tmp_path, "fedavg", seed=1)
    runs, (table,) = made(tmp_path)
    assert "nothing to compare in pairs" in accuracy.duels(table, Comparisons(runs, "accuracy", "last"))


def test_markdown_marks_and_escapes(grid):
    _, (table,) = made(grid)
    lines = [line for line in accuracy.markdown(table).splitlines() if line.startswith("|")]
    assert lines[0] == "| method | cifar10, α=0.1 | cifar10, α=0.5 | cifar100, α=0.1 | cifar100, α=0.5 |"
    assert len({line.count("|") for line in lines}) == 1
    assert all(sum(f"**{c.text()}**" in line for line in lines) for c in table.cells.values() if c.mark == "best")
    assert re.search(r"\| \d\d\.\d\d ± \d+\.\d\d \|", lines[3])


def test_the_latex_table_compiles_in_a_bare_article(write, tmp_path):
    for seed in (0, 1):
        write(tmp_path / "runs", "fedas", seed=seed, hyper={"align_lr": 0.1})
        write(tmp_path / "runs", "fedas", seed=seed, hyper={"align_lr": 0.2})
        write(tmp_path / "runs", "local", seed=seed, dataset="folder:my_images & more%")
        write(tmp_path / "runs", "local", seed=seed, partition="pathological", alpha=None)
    _, (table,) = made(tmp_path / "runs")
    text = accuracy.latex(table)
    assert r"folder:my\_images \& more\%" in text
    assert r"fedas align\_lr=0.1" in text
    assert text.isascii()
    kpsewhich = shutil.which("kpsewhich")
    if kpsewhich is None or subprocess.run([kpsewhich, "booktabs.sty"], capture_output=True, check=False).returncode:
        pytest.skip("LaTeX with booktabs is missing (Debian: texlive-latex-recommended)")
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n" + text + "\\end{document}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").exists()
