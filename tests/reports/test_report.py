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
from PIL import Image

from pflbench import UsageError
from pflbench.reports import plots, report, stats
from pflbench.reports.frames import load, scores

PFLBENCH = Path(sysconfig.get_path("scripts")) / "pflbench"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: chromium)")


@pytest.fixture(scope="module")
def written(grid, tmp_path_factory):
    """The report on the made-up runs, and on one that has diverged."""
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
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert {f"run-{run}" for run in made.runs.runs["run"]} <= set(page.ids)
    assert all(source.startswith("data:") for source in page.sources)
    assert "link" in page.tags  # the icon, which a browser would else ask for
    assert len(page.sources) == 14


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
    assert "need at least 3 methods and 5 settings" in why
    assert why in (out / "report.html").read_text()
    assert not (out / "plots" / "ranks-0.png").exists()


def test_enough_settings_get_a_critical_difference_diagram(write, tmp_path):
    for algo, level in (("fedas", 0.8), ("fedper", 0.7), ("local", 0.5)):
        for alpha in (0.01, 0.1, 0.5, 1.0, 5.0):
            write(tmp_path / "runs", algo, level=level, alpha=alpha)
    write(tmp_path / "runs", "fedas", lr=0.1)  # another protocol, which has no part in it
    made = report.make(load(tmp_path / "runs"))
    (ranks,) = (found for found in made.ranks.values() if isinstance(found, stats.Ranks))
    assert list(ranks.ranks.index) == ["fedas", "fedper", "local"]
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
    assert "90 % of the best method's accuracy" in why
    rows = found.set_index("method")
    assert rows.loc["fedas", ["round", "megabytes", "elapsed"]].tolist() == [5, 5 * 3000 / 1e6, 2.5]
    assert rows.loc["fedavg", ["round", "megabytes", "elapsed"]].isna().all()
    assert rows["reached"].to_dict() == {"fedas": 2, "fedavg": 0}
    ((wanted, _, found),) = report.make(load(tmp_path), target=0.2).targets.values()
    assert wanted == 0.2
    assert found.set_index("method")["round"].to_dict() == {"fedas": 2, "fedavg": 4}


def test_a_band_is_drawn_only_over_rounds_that_all_seeds_have():
    data = pd.DataFrame(
        {"method": "m", "run": list("aabcdd"), "round": [1, 2, 1, 1, 1, 2], "accuracy": [0.1, 0.9, 0.3, 0.2, 0.6, 0.7],
         "megabytes": 1.0, "elapsed": [1.0, 2.0, 3.0, 5.0, 3.0, 4.0]}
    )  # fmt: skip
    rounds, _, seconds = plots.learning(data, plots.styles(["m"]), "a setting").axes
    for axes, x in ((rounds, 1.0), (seconds, 3.0)):
        assert axes.lines[0].get_xydata() == pytest.approx(np.array([[x, 30.0]]))
        (band,) = axes.collections[0].get_paths()
        assert band.get_extents().extents == pytest.approx([x, 10.0, x, 60.0])
    one = plots.learning(data[data["run"] == "d"], plots.styles(["m"]), "one seed").axes[2]
    assert one.lines[0].get_xydata() == pytest.approx(np.array([[3.0, 60.0], [4.0, 70.0]]))
    assert not one.collections


def test_methods_keep_their_colour_and_twenty_two_are_told_apart(written):
    found = plots.styles([f"m{i:02}" for i in range(22)])
    assert len({(s.color, s.linestyle) for s in found.values()}) == 22
    assert plots.styles(["a", "b"])["b"] == plots.styles(["a", "b", "c"])["b"]


def test_equal_runs_make_equal_files(grid, tmp_path):
    for name in ("one", "other"):
        report.write(report.make(load(grid)), tmp_path / name)
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "other" / path.relative_to(tmp_path / "one")).read_bytes(), path


def test_an_older_report_is_replaced_and_nothing_else_ever_is(grid, tmp_path):
    made = report.make(load(grid))
    out = tmp_path / "report"
    report.write(made, out)
    (out / "stale").write_text("")
    report.write(made, out)
    assert not (out / "stale").exists()
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter").write_text("one")
    with pytest.raises(UsageError, match="thesis is there and is no report; choose another --out"):
        report.write(made, precious)
    assert [p.name for p in precious.iterdir()] == ["chapter"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report", "thesis"]


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
    assert "fedas" in done.stdout
    assert "2 runs; report/accuracy.csv" in done.stdout
    assert "diverged: round 1" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["report"], "runs: runs is not there"),
        (["report", "empty"], "there is no finished run to report on; run `pflbench sweep quick` first"),
        (["report", "good", "--metric", "acuracy"], "did you mean 'accuracy'"),
        (["report", "good", "--selection", "first"], "unknown selection 'first'"),
        (["report", "good", "--target", "80"], "target: 80 is out of bounds"),
        (["report", "good", "--target", "x"], "target: 'x' is not a number"),
        (["report", "good", "--out", "good"], "good is there and is no report"),
        (["export", "empty"], "there is no finished run to export"),
        (["export", "good", "--format", "xls"], "unknown format 'xls'"),
        (["compare", "good", "empty"], "empty is not one finished run"),
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


def test_two_runs_are_compared_in_settings_data_results_and_clients(write, tmp_path):
    one = write(tmp_path, "fedas", level=0.8, hyper={"align_lr": 0.1})
    other = write(tmp_path, "fedper", level=0.5)
    done = call("compare", one, other, "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["runs"] == [one.name, other.name]
    assert found["differences"]["spec.algo"] == ["fedas", "fedper"]
    assert found["differences"]["spec.hyperparameters.align_lr"] == [0.1, None]
    assert "spec.lr" not in found["differences"]
    assert "The first is better for 10 clients, the second for 0" in found["test"]
    assert f"p = {2 / 2**10:.3g}, two-sided: significant" in found["test"]
    values = scores(load(one, other))
    assert found["metrics"]["accuracy"] == [values[one.name], values[other.name]]
    assert "align_lr" in call("compare", one, other, cwd=tmp_path).stdout
    third = write(tmp_path, "fedper", level=0.5, seed=1)
    assert "another partition" in call("compare", one, third, cwd=tmp_path).stdout


def test_the_command_exports_tables(write, tmp_path):
    write(tmp_path / "runs")
    done = call("export", "--format", "parquet", cwd=tmp_path)
    assert done.stdout.split() == ["export/runs.parquet", "export/rounds.parquet", "export/clients.parquet"]
    assert len(pd.read_parquet(tmp_path / "export" / "clients.parquet")) == 50


# A browser writes its errors to the page's title, and the page's facts into an element, by this script.
_PROBE = """
<script>
window.onerror = text => { document.title = "error " + text; };
addEventListener("load", () => {
  const click = (table, column) => table.tHead.rows[0].cells[column].querySelector("button").click();
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
  out.images = [...document.images].map(i => i.naturalWidth);
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
    assert len(found["images"]) == 14
    assert min(found["images"]) > 300


@browser
def test_the_page_is_light_or_dark_as_its_reader_has_it(written, tmp_path):
    backs = {look(written[1] / "report.html", tmp_path, width=800, dark=dark)["back"] for dark in (False, True)}
    assert backs == {"rgb(255, 255, 255)", "rgb(20, 23, 26)"}


def test_the_clients_plot_leaves_out_what_is_not_there():
    figure = plots.clients({"a": np.array([0.1, np.nan, 0.3])}, plots.styles(["a"]), "title")
    assert figure.axes[0].get_ylabel() == "accuracy of a client, %"
