"""Every Python block and every command in README.md and docs/ runs.

A `pflbench run` gets the settings of the fixture `quick`, which make it small. A sweep is planned, not computed. What
does not run stands in `NOT_RUN`, with the reason.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import results
import toy  # noqa: F401  (the import of torch is done once, before the time of a test)

from pflbench.sweep.suite import Suite

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = {
    "python3 -m venv .venv && . .venv/bin/activate && pip install . && pflbench run --algo fedas --alpha 0.1":
        "needs the network for pip; a clean clone runs it before a change lands",
    "pip install '.[test]' && pytest -n auto": ".ci/run",
    "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu": "needs the network",
    "pip install ./pflbench-fedtrim": "tests/test_plugin.py installs this package",
    "pflbench run --algo fedtrim --set trim=0.2": "tests/test_plugin.py runs this method",
    "pip install '.[perf]'": "needs the network",
    "pip install 'pflbench[ray]'": "needs the network",
    "ray start --head --port 6379": "would leave a cluster behind; tests/clusters.py starts one",
    "ray start --address 10.0.0.1:6379": "another machine's; tests/clusters.py adds a node",
    "pflbench run --algo fedas --executor ray --ray-address 10.0.0.1:6379": "tests/test_every_executor.py",
    "pflbench sweep fedas-table2 --executor ray --ray-address 10.0.0.1:6379": "tests/test_ray.py",
    "pflbench run --algo fedas --executor ray --workers 2": "tests/test_ray.py",
    "pflbench run --algo fedas --device cuda": "needs a GPU; tests/check_device.py has a pretend one",
    "pflbench run --algo fedas --device cuda --workers 8": "needs a GPU; tests/check_device.py has a pretend one",
    "pflbench sweep quick --device cuda": "needs a GPU",
    "pytest tests/perf -o python_files='bench_*.py'": "takes minutes: tox -e perf",
    "pytest tests/perf/bench_round.py -o python_files='bench_*.py' --scale 1 --pairs 3": "takes minutes: tox -e perf",
    "tar -xf docs/results/fedas.tar.xz": "tests/test_results.py unpacks it",
    "python tests/perf/scale.py": "tests/test_scale.py holds the page against its tables",
    "python tests/perf/scale.py --measure": "takes minutes; a measurement, no test",
    "tox -e perf": "takes minutes; a regression check, no test",
}  # fmt: skip


def blocks(language):
    for page in PAGES:
        for number, code in enumerate(
            re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        ):
            yield pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")


COMMANDS = [(case.id, line) for case in blocks("console") for line in case.values[0].splitlines()]


@pytest.fixture(scope="module")
def folder(tree, quick, tmp_path_factory):
    """A reader's folder after the first runs: records in `runs`, the configuration and the results of the docs."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "docs" / "results", folder / "docs" / "results")
    configuration = next(blocks("toml")).values[0]
    (folder / "experiment.toml").write_text(configuration, encoding="utf-8")
    for algo in ("fedavg", "fedas"):
        done = run(["-m", "pflbench", "run", "--algo", algo, *quick], folder)
        assert done.returncode == 0, done.stderr
    results.records(folder)
    for page in (ROOT / "docs").glob("*.md"):
        for name, code in re.findall(r"`(\w+\.py)`.{0,80}?\n\n```python\n(\"\"\".*?)```", page.read_text(), re.DOTALL):
            (folder / name).write_text(code, encoding="utf-8")
    return folder


def run(arguments, folder):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "http_proxy": "http://127.0.0.1:9"}
    environment |= {"https_proxy": "http://127.0.0.1:9", "TTY_COMPATIBLE": "0"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("line", list(dict.fromkeys(line for _, line in COMMANDS if line not in NOT_RUN)))
def test_the_command_runs(folder, tree, quick, line):
    program, command, *rest = line.split()
    assert program == "pflbench", f"{line}: run it here, or name the reason in NOT_RUN"
    if command == "run" and "--dry-run" not in rest:
        rest += quick
    if command == "sweep":
        rest = [*(part for part in rest if part != "--dry-run"), "--dry-run", *quick[:4]]
    done = run(["-m", "pflbench", command, *rest], folder)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_what_does_not_run_is_there_and_has_a_reason():
    assert set(NOT_RUN) <= {line for _, line in COMMANDS}
    assert all(NOT_RUN.values())


# A block that starts with a docstring is a method's file: tests/test_tutorial.py and tests/test_readme.py.
PYTHON = [case for case in blocks("python") if not case.values[0].startswith('"""')]


@pytest.mark.parametrize("code", PYTHON)
def test_the_python_block_runs(folder, tree, quick, code):
    # The docs name datasets that a test does not have; the folder of small images stands for them.
    small = code.replace('"synthetic10"', f'"folder:{tree}", model="mlp", clients=4, min_samples=2, alpha=1.0')
    small = small.replace('{"dataset": ["cifar100"]}', '{"algo": ["fedas"]}')
    small = small.replace("join_ratio=0.1", "join_ratio=1.0").replace("client_states[3]", "client_states[0]")
    if "join_ratio" not in small:
        small = small.replace("rounds=2", "rounds=2, join_ratio=0.5")
    done = run(["-c", small], folder)
    assert done.returncode == 0, done.stderr


SUITES = [case for case in blocks("toml") if "[base]" in case.values[0]]


@pytest.mark.parametrize("text", SUITES)
def test_the_suite_can_be_read(text, tmp_path):
    import tomllib

    found = Suite.from_toml(tomllib.loads(text), tmp_path / "suite.toml")
    assert found.specs() or found.published


def test_there_is_something_of_each_kind():
    assert len(COMMANDS) > 15
    assert len(PYTHON) >= 4
    assert len(SUITES) >= 2


def test_the_slurm_script_is_a_shell_script_and_its_tasks_share_the_suite(tmp_path):
    """`srun` and `pflbench` of the test print the plan of a task instead of computing it."""
    (script,) = [case.values[0] for case in blocks("bash")]
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    for name, text in (
        ("srun", '"$@" --dry-run --join-ratio 0.2 --alpha 0.1'),
        ("pflbench", f'{sys.executable} -m pflbench "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    seen = []
    for task in (1, 2):
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(task)}
        env |= {"SLURM_ARRAY_TASK_MAX": "2", "SLURM_CPUS_PER_TASK": "3"}
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        seen += [line.split()[0] for line in done.stdout.splitlines()[:-1]]
    assert len(seen) == len(set(seen)) == 10
