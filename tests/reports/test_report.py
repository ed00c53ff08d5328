"""The report as its readers get it: files, and a page in a real browser."""

import html.parser
import json
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import toy
from PIL import Image

from pflbench import UsageError
from pflbench import run as compute
from pflbench.reports import drawing, report, stats
from pflbench.reports.frames import load, scores

PFLBENCH = Path(sysconfig.get_path("scripts")) / "pflbench"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PLOTS = 4 * 5 + 2  # of each setting: three learning curves, the clients, the partition; and two over alphas
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: chromium)")


@pytest.fixture(scope="module")
def written(grid, tmp_path_factory):
    """The report on the made-up runs."""
    out = tmp_path_factory.mktemp("report") / "report"
    made = report.make(load(grid))
    files = report.write(made, out)
    return made, out, files


class Page(html.parser.HTMLParser):
    """What a page refers to, and what is there."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.sources, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        self.sources += [found["src"]] if "src" in found else []


def test_a_report_has_its_files(written):
    _, out, files = written
    assert [f.name for f in files] == ["accuracy.csv", "accuracy.md", "accuracy.tex", "report.html"]
    names = {p.name for p in (out / "plots").iterdir()}
    settings = range(4)
    wanted = {f"{kind}-{i}" for kind in ("learning", "clients", "partition") for i in settings} | {
        "alpha-0-0",
        "alpha-0-1",
    }
    assert names == {f"{name}.{suffix}" for name in wanted for suffix in ("png", "pdf")}
    for path in (out / "plots").glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert len(image.convert("L").getcolors(1000)) > 10  # something is drawn


def test_the_page_needs_nothing_else_and_its_links_lead_somewhere(written):
    made, out, _ = written
    page = Page((out / "report.html").read_text())
    assert len(page.ids) == len(set(page.ids))
    inside = {link[1:] for link in page.links if link.startswith("#")}
    assert inside <= set(page.ids)
    beside = {link for link in page.links if not link.startswith("#")}
    assert beside == {"accuracy.csv", "accuracy.md", "accuracy.tex", "plots/"}
    assert all((out / link).exists() for link in beside)
    assert {f"run-{run}" for run in made.runs.runs["run"]} <= set(page.ids)
    assert all(source.startswith("data:") for source in page.sources)
    assert "link" in page.tags  # the icon, which a browser would else ask for
    assert page.tags.count("svg") == PLOTS


def test_every_number_of_the_table_can_be_traced_to_its_runs(written):
    made, out, _ = written
    text = (out / "report.html").read_text()
    (table,) = made.tables
    values = scores(made.runs)
    for cell in table.cells.values():
        assert f'data-runs="{" ".join(cell.runs)}"' in text
        assert cell.text() in text
        assert cell.mean == pytest.approx(values[list(cell.runs)].mean())
    for run in made.runs.runs["run"]:
        details = text[text.index(f'<details id="run-{run}"') :].split("</details>")[0]
        for name in ("alpha", "lr", "data_fingerprint", "partition_fingerprint", "torch_version", "path"):
            assert f"<dt>{name}</dt>" in details


def test_too_few_settings_are_said_to_be_too_few_and_nothing_is_drawn(written):
    made, out, _ = written
    (why,) = made.ranks.values()
    assert "need at least 3 methods, and 5 settings" in why
    assert why in (out / "report.html").read_text()
    assert not (out / "plots" / "ranks-0.png").exists()


def test_enough_settings_get_a_critical_difference_diagram(write, tmp_path):
    for algo, level in (("fedas", 0.8), ("fedper", 0.7), ("local", 0.5)):
        for alpha in (0.01, 0.1, 0.5, 1.0, 5.0):
            write(tmp_path / "runs", algo, level=level, alpha=alpha)
    write(tmp_path / "runs", "fedas", lr=0.1)  # another protocol, which has no part in it
    made = report.make(load(tmp_path / "runs"))
    (ranks,) = (found for found in made.ranks.values() if isinstance(found, stats.Ranks))
    assert list(ranks.ranks.index) == ["FedAS", "FedPer", "Local"]
    assert ranks.settings == 5
    report.write(made, tmp_path / "report", workers=2)
    assert len(list((tmp_path / "report" / "plots").glob("ranks-*.pdf"))) == 1
    assert "Friedman's test: p =" in (tmp_path / "report" / "report.html").read_text()


def test_costs_to_a_target_are_means_over_the_seeds_that_reach_it(write, tmp_path):
    for seed in range(2):
        write(tmp_path, "fedas", level=0.8, spread=0.0, seed=seed)
        write(tmp_path, "fedavg", level=0.3, spread=0.0, seed=seed)
    ((wanted, why, found),) = report.make(load(tmp_path)).targets.values()
    last = scores(load(tmp_path)).max()
    assert wanted == pytest.approx(0.9 * last, rel=0.02)
    assert "90 % of the best deployed accuracy" in why
    rows = found.set_index("method")
    assert rows.loc["FedAS", list(stats.TO_TARGET)].tolist() == [5, 5 * 3000 / 1e6, 2.5, 1.25]
    assert rows.loc["FedAvg", list(stats.TO_TARGET)].isna().all()
    assert rows["reached"].to_dict() == {"FedAS": 2, "FedAvg": 0}
    ((wanted, _, found),) = report.make(load(tmp_path), target=0.2).targets.values()
    assert wanted == 0.2
    assert found.set_index("method")["round"].to_dict() == {"FedAS": 2, "FedAvg": 4}


def test_seconds_to_a_target_count_the_training_alone(write, tmp_path):
    """Rounds of 0.5 s of training and 0.25 s of evaluation; in schema 1 both are one number."""
    write(tmp_path / "new", "fedas", spread=0.0)
    ((_, why, found),) = report.make(load(tmp_path / "new"), target=0.3).targets.values()
    row = found.iloc[0]
    assert row["elapsed"] == 0.5 * row["round"]
    assert row["evaluating"] == 0.25 * row["round"]
    assert "Seconds of training do not contain the evaluations." in why
    assert "schema 1" not in why
    write(tmp_path / "old", "fedas", spread=0.0, kind=1)
    write(tmp_path / "old", "fedper", spread=0.0)
    made = report.make(load(tmp_path / "old"), target=0.3)
    ((_, why, found),) = made.targets.values()
    rows = found.set_index("method")
    assert rows["elapsed"].to_dict() == {"FedAS": 0.75 * row["round"], "FedPer": row["elapsed"]}
    assert np.isnan(rows.loc["FedAS", "evaluating"])
    assert "In records of schema 1 (here 1 of 2 runs) seconds of training contain the evaluations" in why
    report.write(made, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert why in page
    assert page.count('<td class="missing">unknown</td>') == 1


def test_the_time_axis_says_what_its_seconds_are(write, tmp_path):
    write(tmp_path, "fedas", dataset="cifar10")
    write(tmp_path, "fedas", dataset="cifar100")
    write(tmp_path, "fedper", dataset="cifar100", kind=1)
    jobs = {job.name: job.arguments for job in drawing.jobs(report.make(load(tmp_path)))}
    assert jobs["learning-0"][-1] == "seconds of training"
    assert jobs["learning-1"][-1] == "seconds, with evaluations in some runs"


def test_records_of_schema_1_are_reported(old, tmp_path):
    made = report.make(load(old))
    (table,) = made.tables
    assert table.rows == ["FedAS", "FedAvg"]
    assert [len(cell.runs) for cell in table.cells.values()] == [2, 2]
    ((_, why, found),) = made.targets.values()
    assert "(here 4 of 4 runs)" in why
    assert found["reached"].tolist() == [1, 0]
    report.write(made, tmp_path / "report")
    assert "FedAS" in (tmp_path / "report" / "report.html").read_text()


def test_runs_on_own_data_are_reported(tmp_path):
    """Their data have one fingerprint for samples and partition."""
    for algo in ("fedavg", "fedper"):
        compute(toy.spec(algo), toy.federation(), toy.net(), executor="serial", out=tmp_path / "runs")
    (table,) = report.make(load(tmp_path / "runs")).tables
    assert table.rows == ["FedAvg", "FedPer"]


def test_equal_runs_make_equal_files(written, grid, tmp_path):
    _, out, _ = written
    report.write(report.make(load(grid)), tmp_path)
    paths = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert len(paths) == 32
    for path in paths:
        assert (out / path).read_bytes() == (tmp_path / path).read_bytes(), path


def test_an_older_report_is_replaced_and_nothing_else_ever_is(write, tmp_path):
    made = report.make(load(write(tmp_path / "runs")))
    out = tmp_path / "report"
    report.write(made, out)
    (out / "stale").write_text("")
    report.write(made, out)
    assert not (out / "stale").exists()
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter").write_text("one")
    with pytest.raises(UsageError, match="thesis exists and is no report; choose another --out"):
        report.write(made, precious)
    assert [p.name for p in precious.iterdir()] == ["chapter"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report", "runs", "thesis"]


def call(*args, cwd):
    return subprocess.run(
        [PFLBENCH, *map(str, args)], cwd=cwd, capture_output=True, text=True, check=False, timeout=120
    )


def test_the_command_prints_the_table_and_says_what_was_left_out(write, tmp_path):
    write(tmp_path / "runs", "fedas", level=0.8)
    write(tmp_path / "runs", "local", level=0.3)
    write(tmp_path / "runs", "fedavg", edit=lambda run: run.update(status="diverged", reason="round 1: client 0: no"))
    done = call("report", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Note: left out runs/\w{12}: diverged: round 1: client 0: no", done.stderr)
    assert "FedAS" in done.stdout
    assert "2 runs; report/accuracy.csv" in done.stdout
    assert "diverged: round 1" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["report"], "runs: runs does not exist"),
        (["report", "empty"], "there is no finished run to report on; run `pflbench sweep quick` first"),
        (["report", "good", "--metric", "acuracy"], "did you mean 'accuracy'"),
        (["report", "good", "--selection", "first"], "unknown selection 'first'"),
        (["report", "good", "--target", "80"], "target: 80 is out of bounds"),
        (["report", "good", "--target", "x"], "target: 'x' is not a number"),
        (["report", "good", "--out", "good"], "good exists and is no report"),
        (["export", "empty"], "there is no finished run to export"),
        (["export", "good", "--format", "xls"], "unknown format 'xls'"),
        (["compare", "good", "empty"], "empty is not one finished run"),
        (["report", "good", "--where", "alpha=3"], "where: no run has alpha 3.0; the runs have alpha 0.1"),
        (["report", "good", "--where", "alpha"], "where: 'alpha' is not NAME=VALUE"),
        (["export", "good", "--method", "fedsa"], "unknown method 'fedsa'; did you mean 'fedas'?"),
    ],
)
def test_bad_input_is_one_line(write, tmp_path, args, message):
    write(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    done = call(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "good"]


def test_the_command_compares_two_runs(write, tmp_path):
    one = write(tmp_path, "fedas", level=0.8, hyper={"align_lr": 0.1})
    other = write(tmp_path, "fedper", level=0.5)
    found = json.loads(call("compare", one, other, "--json", cwd=tmp_path).stdout)
    assert found["differences"]["spec.algo"] == ["fedas", "fedper"]
    text = call("compare", one, other, cwd=tmp_path).stdout
    assert "align_lr" in text
    assert found["test"] in text


def test_commands_take_ids_of_runs(write, tmp_path):
    one, other = write(tmp_path / "runs", "fedas", level=0.8), write(tmp_path / "runs", "fedper")
    write(tmp_path / "runs", "fedavg")
    text = call("compare", one.name, other.name[:4], "--json", cwd=tmp_path).stdout
    assert json.loads(text)["runs"] == [one.name, other.name]
    assert call("export", one.name, other.name[:6], cwd=tmp_path).returncode == 0
    assert set(pd.read_csv(tmp_path / "export" / "runs.csv")["run"]) == {one.name, other.name}
    done = call("compare", one.name, "0000", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "'0000' is no folder, and no id of a run in runs" in done.stderr


def test_commands_select_runs_by_setting_and_method(grid, tmp_path):
    chosen = ("--where", "dataset=cifar100", "--where", "join-ratio=0.5", "--method", "fedas", "--method", "fedper")
    assert call("export", grid, *chosen, "--where", "alpha=0.1", "--where", "alpha=0.5", cwd=tmp_path).returncode == 0
    table = pd.read_csv(tmp_path / "export" / "runs.csv")
    assert table.groupby(["algo", "dataset", "alpha"]).size().to_dict() == {
        (algo, "cifar100", alpha): 3 for algo in ("fedas", "fedper") for alpha in (0.1, 0.5)
    }
    done = call("report", grid, *chosen, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "FedPer" in done.stdout
    assert "FedAvg" not in done.stdout
    assert "12 runs; report/accuracy.csv" in done.stdout


def test_the_command_exports_tables(write, tmp_path):
    write(tmp_path / "runs")
    done = call("export", "--format", "parquet", cwd=tmp_path)
    assert done.stdout.split() == [f"export/{name}.parquet" for name in ("runs", "rounds", "evaluations", "clients")]
    assert len(pd.read_parquet(tmp_path / "export" / "clients.parquet")) == 50


# A browser writes its errors to the page's title, and the page's facts into an element, by this script.
def test_the_page_has_hyperparameters_and_how_many_clients_took_part(write, tmp_path):
    write(tmp_path / "runs", "fedas", hyper={"align_lr": 0.25, "alignment": "off"})
    write(tmp_path / "runs", "fedavg")
    report.write(report.make(load(tmp_path / "runs")), tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    methods = page[page.index('<section id="methods">') : page.index('<section id="runs">')]
    rows = re.findall(
        r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td class="text">(.*?)</td>', methods
    )
    assert rows == [
        ("FedAS", "1", "1", "2 of 10", "align_lr=0.25, alignment=off"), ("FedAvg", "1", "1", "2 of 10", "none"),
    ]  # fmt: skip


def test_the_details_of_a_run_are_words_and_units(write, tmp_path):
    run = write(tmp_path / "runs", "fedas", hyper={"align_lr": 0.25}).name
    report.write(report.make(load(tmp_path / "runs")), tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    details = page[page.index(f'<details id="run-{run}"') :].split("</details>")[0]
    for name, value in (
        ("hyperparameters", "align_lr=0.25"), ("bytes_up", "0.0 MB"), ("seconds", "2.5 s"), ("lr", "0.005"),
        ("shuffle", "true"),
    ):  # fmt: skip
        assert f"<dt>{name}</dt><dd>{value}</dd>" in details


def test_the_page_has_its_title_date_and_version(write, tmp_path):
    write(tmp_path / "runs")
    report.write(report.make(load(tmp_path / "runs")), tmp_path / "a", title="A <trial>", date="2026-01-02")
    page = (tmp_path / "a" / "report.html").read_text()
    assert "<title>A &lt;trial&gt;</title>" in page
    assert "2026-01-02, pflbench 0." in page
    report.write(report.make(load(tmp_path / "runs")), tmp_path / "b")
    assert "2026-01-02" not in (tmp_path / "b" / "report.html").read_text()


def test_pairs_that_are_too_few_to_test_are_counted(write, tmp_path):
    write(tmp_path / "runs", "fedas", clients=4)
    write(tmp_path / "runs", "fedavg", clients=4, level=0.2)
    write(tmp_path / "runs", "fedas", alpha=0.5, clients=10, level=0.9)
    write(tmp_path / "runs", "fedavg", alpha=0.5, clients=10, level=0.2)
    made = report.make(load(tmp_path / "runs", columns=["dataset", "alpha", "clients"]))
    (duel,) = made.duels.values()
    assert duel.untested == 1
    report.write(made, tmp_path / "report")
    assert "1 comparisons of two methods" in (tmp_path / "report" / "report.html").read_text()


def test_a_mean_of_rounds_that_is_no_integer_has_decimals(write, tmp_path):
    for seed in range(3):
        write(tmp_path / "runs", level=0.5, spread=0.01, seed=seed, peak=3 if seed else None)
    report.write(report.make(load(tmp_path / "runs"), target=0.25), tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Costs to reach 25.0 % accuracy" in page
    (shown,) = re.findall(r'<tr><th scope="row">FedAvg</th><td data-value="([\d.]+)">([\d.]+)</td>', page)
    assert shown[1] == f"{float(shown[0]):.1f}"
    assert not float(shown[0]).is_integer()


_PROBE = """
<script>
window.onerror = text => { document.title = "error " + text; };
addEventListener("load", () => {
  const click = (table, column) => [...table.tHead.rows].at(-1).cells[column].querySelector("button").click();
  const text = cell => cell.dataset.value || cell.textContent;
  const column = (table, i) => [...table.tBodies[0].rows].map(row => text(row.cells[i]));
  const table = document.querySelector("table.sortable"), out = {};
  out.before = column(table, 0);
  click(table, 1); out.down = column(table, 1);
  click(table, 1); out.up = column(table, 1);
  click(table, 0); out.names = column(table, 0);
  const link = table.querySelector("a[data-runs]");
  link.click();
  out.open = [...document.querySelectorAll("details")].filter(d => d.open).map(d => d.id);
  out.wanted = link.dataset.runs.split(" ").map(run => "run-" + run);
  out.width = [document.documentElement.scrollWidth, innerWidth];
  out.images = [...document.querySelectorAll("svg")].map(i => i.getBoundingClientRect().width);
  out.type = [...new Set([...document.querySelectorAll(".plots svg text")].map(t =>
    (parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a).toFixed(1)))];
  out.text = [...new Set([...document.querySelectorAll("svg text")].map(t => getComputedStyle(t).fill))];
  const first = document.querySelector(".wide table"), wide = first.parentElement;
  wide.scrollLeft = 60;
  out.method = first.tBodies[0].rows[0].cells[0].getBoundingClientRect().left - wide.getBoundingClientRect().left;
  const shown = () => [...document.querySelectorAll(".of-metric")].filter(d => d.offsetHeight).map(d => d.className);
  out.chosen = shown();
  document.getElementById("metric-accuracy_worst10").click();
  out.switched = shown();
  out.back = getComputedStyle(document.body).backgroundColor;
  document.body.innerHTML = "<pre id=probe>" + JSON.stringify(out) + "</pre>";
});
</script>
"""


def look(page, folder, *, width, dark=False):
    """What the browser finds in `page`, in a window `width` pixels wide."""
    probe = folder / "probe.html"
    # A window of Chromium is 500 pixels wide at least; a frame may be as narrow as a phone.
    probe.write_text(page.read_text().replace("<head>", "<head>" + _PROBE, 1))
    frame = folder / "frame.html"
    frame.write_text(
        f'<body style="margin:0"><iframe id=f src="probe.html" style="width:{width}px;height:800px;border:0"></iframe>'
        "<script>addEventListener('load', () => setTimeout(() => {"
        "const d = document.getElementById('f').contentDocument;"
        "document.body.innerHTML = '<p id=title>' + d.title + '</p>' + d.body.innerHTML; }, 300));</script>"
    )
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--window-size=1400,900",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []), "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=120)
    finally:
        for _ in range(20):
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                break
            time.sleep(0.05)
    assert '<p id="title">pflbench report</p>' in out, (out[:500], err[-500:])
    return json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', out, re.DOTALL).group(1)))


@browser
@pytest.mark.parametrize("width", [380, 1280])
def test_in_a_browser_the_page_sorts_its_links_open_runs_and_nothing_overflows(written, tmp_path, width):
    found = look(written[1] / "report.html", tmp_path, width=width)
    values = [float(v) for v in found["down"]]
    assert values == sorted(values, reverse=True)
    assert [float(v) for v in found["up"]] == sorted(values)
    assert len(set(values)) == 4
    assert found["names"] == sorted(found["before"])
    assert sorted(found["open"]) == sorted(found["wanted"])
    assert len(found["open"]) == 3
    content, window = found["width"]
    assert content <= window == width
    assert len(found["images"]) == PLOTS
    assert min(found["images"]) > 300
    assert found["method"] == 0  # the first column stays where it is
    assert found["chosen"] == ["of-metric accuracy chosen"]
    assert found["switched"] == ["of-metric accuracy_worst10"]
    assert len(found["type"]) <= 2  # of ticks and labels, and of titles


@browser
def test_the_page_is_light_or_dark_as_its_reader_has_it(written, tmp_path):
    light, dark = (look(written[1] / "report.html", tmp_path, width=800, dark=dark) for dark in (False, True))
    assert (light["back"], dark["back"]) == ("rgb(255, 255, 255)", "rgb(20, 23, 26)")
    assert (light["text"], dark["text"]) == (["rgb(27, 31, 36)"], ["rgb(230, 233, 236)"])  # of plots
