"""The wheel: it contains all of pflbench, and hides no other package."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "pflbench": "pflbench",
    "algorithms": "pflbench/algorithms",
    "datasets": "pflbench/datasets",
    "reports": "pflbench/reports",
}  # in the repository: in the wheel
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the repository: building writes into the source."""
    source, out = tmp_path_factory.mktemp("source") / "pflbench", tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist", "tests", "docs", "runs", ".*")
    shutil.copytree(ROOT, source, ignore=skipped)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="session")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory, pip_install: Callable[..., None]) -> Path:
    """A folder with the wheel installed, and nothing else."""
    target = tmp_path_factory.mktemp("site")
    pip_install(wheel, target)
    return target


@pytest.fixture(scope="session")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def run(site: Path | str, cwd: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a command with the wheel first in the import path."""
    env = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)


def test_one_package_at_the_top(names: set[str]) -> None:
    info = f"pflbench-{PROJECT['version']}.dist-info"
    assert {PurePosixPath(name).parts[0] for name in names} == {"pflbench", info}
    assert f"{info}/licenses/LICENSE" in names


def test_every_module_is_inside_and_nothing_else(names: set[str]) -> None:
    ours = {
        f"{there}/{path.relative_to(ROOT / here).as_posix()}"
        for here, there in FOLDERS.items()
        for path in (ROOT / here).rglob("*.py")
    }
    assert len(ours) > 30
    suites = {f"pflbench/sweep/suites/{path.name}" for path in (ROOT / "pflbench" / "sweep" / "suites").iterdir()}
    assert len(suites) == 6
    assert {name for name in names if ".dist-info/" not in name} == (
        ours | suites | {"pflbench/py.typed", "pflbench/reports/page.html.j2"}
    )


def test_metadata(wheel: Path, names: set[str]) -> None:
    (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as file:
        metadata = file.read(path).decode()
        entry_points = file.read(path.replace("METADATA", "entry_points.txt")).decode()
    assert f"\nVersion: {PROJECT['version']}\n" in metadata
    assert re.search(r"^Requires-Dist: torch>=", metadata, re.MULTILINE)
    assert "[console_scripts]\npflbench = pflbench.cli:main\n" in entry_points
    # The description is the README, hence there is one.
    assert metadata.split("\n\n", 1)[1].strip()


@pytest.mark.parametrize("name", ["algorithms", "datasets", "reports", "tests"])
def test_no_folder_of_ours_is_importable_at_the_top(site: Path, tmp_path: Path, name: str) -> None:
    # -S: the standard library and the wheel, whatever else this environment has.
    code = f"import sys\nassert {str(site)!r} in sys.path\nimport {name}"
    done = run(site, tmp_path, sys.executable, "-S", "-c", code)
    assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr


def test_somebody_elses_datasets_stays_itself(site: Path, tmp_path: Path) -> None:
    """Hugging Face's package has that name."""
    theirs = tmp_path / "theirs" / "datasets"
    theirs.mkdir(parents=True)
    (theirs / "__init__.py").write_text("from datasets.load import load_dataset\n")
    (theirs / "load.py").write_text("def load_dataset(name):\n    return 'theirs: ' + name\n")
    code = (
        "import datasets, pflbench.datasets, pflbench.algorithms, pflbench.reports\n"
        "from datasets import load_dataset\n"
        "from pflbench.datasets import DATASETS\n"
        "assert pflbench.datasets is not datasets\n"
        "print(load_dataset('mnist'), 'auto' in DATASETS, pflbench.datasets.__file__)"
    )
    for order in ([site, theirs.parent], [theirs.parent, site]):
        done = run(os.pathsep.join(map(str, order)), tmp_path, sys.executable, "-c", code)
        assert done.stderr == ""
        assert done.stdout.strip() == f"theirs: mnist True {site / 'pflbench' / 'datasets' / '__init__.py'}"


def test_the_installed_command(site: Path, tmp_path: Path) -> None:
    command = shutil.which("pflbench", path=site / "bin") or site / "Scripts" / "pflbench.exe"

    def out(*args: str) -> str:
        done = run(site, tmp_path, command, *args)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert out("--version") == f"pflbench {PROJECT['version']}\n"
    listed = {line.split()[0] for line in out("list", "algorithms").splitlines()}
    assert listed >= {"fedas", "fedavg", "fedavg-ft", "fedper", "fedrep", "local"}
    assert listed >= {p.stem.replace("_", "-") for p in (ROOT / "algorithms").glob("[!_]*.py")}
    assert "cifar10" in out("list", "datasets")


def test_the_installed_methods_are_the_wheels(site: Path, tmp_path: Path) -> None:
    code = (
        "import sys, json\nfrom pflbench.core import registry\n"
        "found = {n: sys.modules[registry.algorithm(n).__module__].__file__ for n in registry.algorithms()}\n"
        "print(json.dumps(found))"
    )
    done = run(site, tmp_path, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ours = {p.stem.replace("_", "-"): p.name for p in (ROOT / "algorithms").glob("[!_]*.py")}
    assert {n: Path(f) for n, f in found.items() if n in ours} == {
        name: site / "pflbench" / "algorithms" / file for name, file in ours.items()
    }


def test_every_import_is_a_dependency() -> None:
    """What pflbench imports is the standard library, itself, or declared in pyproject.toml."""
    declared = {re.split(r"[<>=\[; ]", text)[0].lower() for text in PROJECT["dependencies"]}
    for extra in PROJECT.get("optional-dependencies", {}).values():
        declared |= {re.split(r"[<>=\[; ]", text)[0].lower() for text in extra}
    modules = {"pillow": "PIL"}
    allowed = {modules.get(name, name.replace("-", "_")) for name in declared} | sys.stdlib_module_names | {"pflbench"}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    found = [node.module or ""]
                for name in found:
                    assert name.split(".")[0] in allowed, f"{path} imports {name}"
