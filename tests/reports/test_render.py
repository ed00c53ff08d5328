import csv
import io
import re
import shutil
import subprocess

import pytest
from rich.console import Console

from pflbench.reports import render
from pflbench.reports.accuracy import Comparisons, accuracy_tables
from pflbench.reports.frames import load


def made(folder, metric="accuracy", selection="last"):
    runs = load(folder)
    return accuracy_tables(runs, metric, selection, Comparisons(runs, metric, selection))


def test_markdown_marks_and_escapes(grid):
    (table,) = made(grid)
    lines = [line for line in render.markdown(table).splitlines() if line.startswith("|")]
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
    (table,) = made(tmp_path / "runs")
    text = render.latex(table)
    assert r"folder:my\_images \& more\%" in text
    assert r"FedAS align\_lr=0.1" in text
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


def test_selection_by_the_test_data_is_labelled_as_what_it_is(grid):
    (table,) = made(grid, selection="best-test")
    assert "best round on the TEST data" in render.markdown(table)
    assert "best round on the TEST data" in render.latex(table)


def test_a_missing_cell_is_shown_as_missing(write, tmp_path):
    write(tmp_path, "fedavg")
    write(tmp_path, "fedas", dataset="cifar100")
    (table,) = made(tmp_path)
    assert render.markdown(table).count("missing") == 2
    assert render.latex(table).count("--") == 2
    assert [r["seeds"] for r in csv.DictReader(io.StringIO(render.csv_text([table])))].count("0") == 2


def test_methods_have_their_papers_names_and_the_csv_their_ids_too(write, tmp_path):
    names = {
        "fedas": "FedAS", "per-fedavg": "Per-FedAvg", "fedavg-ft": "FedAvg-FT", "local": "Local", "pfedme": "pFedMe",
        "unheard-of": "unheard-of",
    }  # fmt: skip
    for algo in names:
        write(tmp_path, algo)
    (table,) = made(tmp_path)
    order = ["FedAS", "FedAvg-FT", "Local", "Per-FedAvg", "pFedMe", "unheard-of"]
    rows = [line.split("|")[1].strip() for line in render.markdown(table).splitlines() if line.startswith("|")]
    assert rows == ["method", "---", *order]
    assert [line.split("&")[0].strip() for line in render.latex(table).splitlines() if r"\\" in line][2:] == order
    lines = csv.DictReader(io.StringIO(render.csv_text([table])))
    assert {line["algo"]: line["method"] for line in lines} == names
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render.terminal(table))
    assert all(name in capture.get() for name in order)
