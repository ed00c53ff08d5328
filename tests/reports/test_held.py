"""Published figures beside ours."""

import csv
from pathlib import Path

import pytest

from pflbench import UsageError
from pflbench.published import Published
from pflbench.reports import load, scores
from pflbench.reports import report as reporting
from pflbench.reports.published import csv_text, hold, lines, markdown

BASE = {"dataset": "cifar10", "clients": 10, "rounds": 5, "join_ratio": 0.5}


def published(*rows, columns=None, base=None):
    rows = rows or ({"algo": "fedavg", "percent": [50, 40], "metric": "own_accuracy", "name": "FedAvg-P"},)
    values = {"source": "A paper, Table 1", "columns": columns or {"alpha": [0.1, 0.5]}, "row": list(rows)}
    return Published.from_toml(values, base or BASE, Path("suite.toml"))


def test_a_figure_stands_beside_ours_and_the_difference_is_to_the_one_that_it_is_held_against(write, tmp_path):
    write(tmp_path, tested="both", level=0.8)
    runs = load(tmp_path)
    found = hold(runs, published())
    first, second = found.rows
    own = scores(runs, "own_accuracy").iloc[0]
    assert (first.method, first.column, first.published) == ("FedAvg-P", "α=0.1", 0.5)
    assert first.held.mean == own
    assert first.difference == pytest.approx(own - 0.5)
    assert first.ours["accuracy", "last"].mean == scores(runs, "accuracy").iloc[0] == pytest.approx(2 * own)
    assert first.ours["own_accuracy", "best-test"].mean == scores(runs, "own_accuracy", "best-test").iloc[0]
    assert (second.published, second.ours, second.held, second.difference, second.runs) == (0.4, {}, None, None, ())


def test_a_cell_without_a_run_is_missing_and_never_ours(write, tmp_path):
    write(tmp_path, tested="both")
    row = lines(hold(load(tmp_path), published()).rows)[1]
    assert row["published"] == "40.00"
    assert {row[name] for name in ("deployed", "own", "mixed", "difference")} == {None}
    text = markdown(hold(load(tmp_path), published()))
    assert "| FedAvg-P | α=0.5 | 40.00 | missing | missing | missing | missing | missing | own | missing |" in text
    assert "1 of 2 published figures have no run of ours." in text


def test_a_method_that_pflbench_does_not_have_is_missing(write, tmp_path):
    write(tmp_path)
    found = hold(load(tmp_path), published({"algo": "gpfl", "percent": [61, 62]}))
    assert [row.ours for row in found.rows] == [{}, {}]


def test_more_than_two_deviations_over_seeds_are_a_sentence(write, tmp_path):
    for seed in (0, 1, 2):
        write(tmp_path, level=0.8, spread=0.02, seed=seed)
    runs = load(tmp_path)
    values = scores(runs, "accuracy")
    std = float(values.std(ddof=1))
    for off, said in ((1.9, 0), (2.1, 1), (-2.1, 1)):
        percent = 100 * (float(values.mean()) + off * std)
        found = hold(runs, published({"algo": "fedavg", "percent": [percent]}, columns={"alpha": [0.1]}))
        sentences = [note for note in found.notes if "more than two standard deviations over 3 seeds" in note]
        assert len(sentences) == said
        if said:
            assert ("below" if off > 0 else "above") in sentences[0]
            assert sentences[0].startswith("FedAvg, α=0.1: ours is ")


def test_one_seed_is_said_to_be_one(write, tmp_path):
    write(tmp_path, tested="both")
    assert "Ours is one seed" in " ".join(hold(load(tmp_path), published()).notes)


def test_hyperparameters_tell_rows_of_one_method_apart(write, tmp_path):
    write(tmp_path, "fedas", hyper={"alignment": "off"}, level=0.3)
    write(tmp_path, "fedas", hyper={}, level=0.6)
    rows = ({"algo": "fedas", "set": {"alignment": "off"}, "percent": [30]}, {"algo": "fedas", "percent": [60]})
    off, both = hold(load(tmp_path), published(*rows, columns={"alpha": [0.1]})).rows
    assert abs(off.difference) < 0.15 > abs(both.difference)
    assert off.runs != both.runs


def test_runs_of_another_setting_than_the_suites_are_used_only_if_they_agree_and_are_named(write, tmp_path):
    write(tmp_path, dataset="folder:jpegs", level=0.8, tested="both")
    found = hold(load(tmp_path), published())
    assert found.rows[0].held is not None
    assert "dataset is folder:jpegs instead of cifar10" in found.notes[0]
    write(tmp_path, dataset="folder:others", tested="both")
    found = hold(load(tmp_path), published())
    assert found.rows[0].held is None
    assert "the runs differ in dataset: choose with --where" in found.notes[0]
    write(tmp_path, dataset="cifar10", tested="both")
    found = hold(load(tmp_path), published())
    assert len(found.rows[0].runs) == 1
    assert "dataset" not in " ".join(found.notes)


def test_the_csv_has_fractions_and_the_runs(write, tmp_path):
    folder = write(tmp_path, tested="both")
    first, second = csv.DictReader(csv_text(hold(load(tmp_path), published())).splitlines())
    assert float(first["published"]) == 0.5
    assert float(first["difference"]) == pytest.approx(float(first["own"]) - 0.5)
    assert (first["held against"], first["seeds"], first["runs"]) == ("own", "1", folder.name)
    assert (second["own"], second["difference"], second["seeds"], second["runs"]) == ("", "", "0", "")


def test_the_report_has_files_a_plot_for_each_column_with_runs_and_a_section(write, tmp_path):
    write(tmp_path / "runs", tested="both")
    made = reporting.make(load(tmp_path / "runs"), published=[published()])
    reporting.write(made, tmp_path / "report")
    assert (tmp_path / "report" / "published.md").read_text().startswith("Accuracy in percent, beside")
    assert (tmp_path / "report" / "published.csv").exists()
    plots = sorted(path.name for path in (tmp_path / "report" / "plots").glob("published*"))
    assert plots == ["published-0-0.pdf", "published-0-0.png"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Published figures and ours" in page
    assert "A paper, Table 1" in page


def test_the_mixed_accuracy_is_of_own_models_of_participants_and_deployed_models_of_the_others(write, tmp_path):
    write(tmp_path, tested="both", algo="fedavg")  # the participants of every round are clients 0 and 1
    write(tmp_path, algo="local")
    runs = load(tmp_path)
    rows = runs.clients[(runs.clients["round"] == 5) & runs.clients["own_accuracy"].notna()].sort_values("client")
    right = [
        row["n"] * (row["own_accuracy"] if row["client"] in (0, 1) else row["accuracy"]) for _, row in rows.iterrows()
    ]
    by_run = scores(runs, "mixed_accuracy")
    both = runs.runs.set_index("run")["tested"] == "both"
    assert by_run[both].iloc[0] == pytest.approx(sum(right) / rows["n"].sum())
    worst = min(r / n for r, n in zip(right, rows["n"], strict=True))  # of ten clients
    assert scores(runs, "mixed_accuracy_worst10")[both].iloc[0] == pytest.approx(worst)
    assert by_run[~both].isna().all()
    best = runs.evaluations.groupby("run")["mixed_accuracy"].max()
    assert scores(runs, "mixed_accuracy", "best-test")[both].iloc[0] == best[both].iloc[0]


def test_a_seed_counts_once_even_if_two_sources_have_it(write, tmp_path):
    def other(run):
        run["fingerprints"]["algorithm"] = "f" * 64

    write(tmp_path / "a", tested="both")
    write(tmp_path / "b", tested="both", edit=other)
    write(tmp_path / "b", tested="both", seed=1)
    found = hold(load(tmp_path / "a", tmp_path / "b"), published())
    assert found.rows[0].held.seeds == 2
    assert "Runs of FedAvg-P have different sources" in found.notes[0]


def test_a_hyperparameter_that_a_record_lacks_has_its_default(write, tmp_path):
    write(tmp_path, "fedas", hyper={})
    rows = ({"algo": "fedas", "set": {"alignment": "off"}, "percent": [30]}, {"algo": "fedas", "percent": [60]})
    off, both = hold(load(tmp_path), published(*rows, columns={"alpha": [0.1]})).rows
    assert off.held is None
    assert both.held is not None


def test_a_misspelt_hyperparameter_is_refused(write, tmp_path):
    write(tmp_path, "fedas")
    with pytest.raises(UsageError, match="unknown hyperparameter of fedas in published 'alignement'"):
        hold(load(tmp_path), published({"algo": "fedas", "set": {"alignement": "off"}, "percent": [1, 2]}))


@pytest.mark.parametrize("first", ["both", "deployed"])
def test_of_two_records_of_a_seed_the_one_with_the_figure_is_used(write, tmp_path, first):
    def other(run):
        run["fingerprints"]["algorithm"] = "f" * 64

    second = "deployed" if first == "both" else "both"
    write(tmp_path / "a", tested=first)
    write(tmp_path / "b", tested=second, edit=other, eval_every=5)
    assert hold(load(tmp_path / "a", tmp_path / "b"), published()).rows[0].held is not None


def test_the_settings_of_a_method_in_the_suite_are_those_of_its_figures(write, tmp_path):
    write(tmp_path, "fedprox", lr=0.1, hyper={"mu": 0.25})
    write(tmp_path, "fedavg", hyper={})
    values = {
        "source": "s", "columns": {"alpha": [0.1]},
        "row": [{"algo": "fedprox", "percent": [1]}, {"algo": "fedavg", "percent": [2]}],
    }  # fmt: skip
    algorithm = {"fedprox": {"lr": 0.1, "set": {"mu": 0.25}}}
    found = hold(load(tmp_path), Published.from_toml(values, BASE, Path("suite.toml"), algorithm=algorithm))
    assert [row.held is not None for row in found.rows] == [True, True]
    assert "settings" not in " ".join(found.notes)


def test_settings_that_follow_from_a_column_are_those_of_the_column(write, tmp_path):
    write(tmp_path, partition="iid", alpha=None)
    write(tmp_path, partition="dirichlet", alpha=0.1)
    columns = {"partition": ["dirichlet", "iid"]}
    found = hold(load(tmp_path), published({"algo": "fedavg", "percent": [1, 2]}, columns=columns))
    assert [row.held is not None for row in found.rows] == [True, True]


def test_a_suite_without_rows_is_refused():
    with pytest.raises(UsageError, match="row is empty"):
        Published.from_toml({"source": "s", "columns": {"alpha": [0.1]}, "row": []}, BASE, Path("suite.toml"))


def test_the_page_links_our_figures_and_folds_the_cells_without_runs(write, tmp_path):
    run = write(tmp_path / "runs", tested="both").name
    reporting.write(reporting.make(load(tmp_path / "runs"), published=[published()]), tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    section = page[page.index('<section id="published-0">') : page.index('<section id="setting-0">')]
    assert section.count(f'data-runs="{run}"') == 6  # five figures and the difference
    folded = section[section.index("<details>") :]
    assert "1 published figures without a run of ours" in folded
    assert '<td>α=0.5</td><td>40.00</td><td class="missing">missing</td>' in folded


def test_a_difference_of_nothing_has_no_sign(write, tmp_path):
    write(tmp_path)
    runs = load(tmp_path)
    percent = 100 * float(scores(runs, "accuracy").iloc[0])
    row = {"algo": "fedavg", "percent": [percent - 1e-7]}
    assert lines(hold(runs, published(row, columns={"alpha": [0.1]})).rows)[0]["difference"] == "0.00"
