"""The records in docs/results: they can be reported on, and the page says what they say."""

import results

from pflbench.reports import load
from pflbench.reports import report as reporting


def test_the_tables_of_the_page_are_current():
    text = results.PAGE.read_text(encoding="utf-8")
    assert text == results.page(text), "run: python tests/results.py"


def test_anybody_can_report_on_the_records(tmp_path):
    runs = load(results.records(tmp_path))
    assert len(runs.left_out) == 0
    assert set(runs.runs["tested"]) == {"both"}
    assert runs.runs["rounds"].eq(40).all()
    published = [results.read_suite(suite).published for suite in results.SUITES]
    files = reporting.write(reporting.make(runs, published=published), tmp_path / "report")
    assert {"report.html", "published.md", "published.csv"} <= {path.name for path in files}


def test_the_file_is_small_and_has_no_checkpoints():
    assert (results.FOLDER / "fedas.tar.xz").stat().st_size < 5e6
    with results.tarfile.open(results.FOLDER / "fedas.tar.xz") as archive:
        names = {name.rpartition("/")[2] for name in archive.getnames() if name.count("/") == 2}
    assert names == {"run.json", "rounds.jsonl", "evaluations.jsonl", "clients.parquet", "samples.parquet"}
