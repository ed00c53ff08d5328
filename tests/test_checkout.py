"""A checkout works without an installation: its folders are next to each other."""

import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from pflbench.core import registry

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the packages of this one, except pflbench."""
    folder = tmp_path_factory.mktemp("python")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = folder / "packages"
    packages.mkdir()
    for site in (Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")):
        for path in site.iterdir():
            if "pflbench" not in path.name and path.suffix != ".pth" and not (packages / path.name).exists():
                (packages / path.name).symlink_to(path)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout") / "pflbench"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist", "runs", ".*")
    shutil.copytree(ROOT, folder, ignore=skipped)
    return folder


@pytest.fixture
def call(
    python: Path, checkout: Path, environment: Callable[..., dict[str, str]]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python in the checkout."""
    env = {name: value for name, value in environment().items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}

    def run(*args: object, cwd: Path = checkout) -> subprocess.CompletedProcess[str]:
        command = [str(python), *map(str, args)]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)

    return run


def test_nothing_is_installed(call: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """Otherwise the other tests of this module would prove nothing."""
    done = call("-c", "import torch, pflbench", cwd=tmp_path)
    assert "No module named 'pflbench'" in done.stderr


def test_the_snippet_of_the_readme_runs(call: Callable[..., subprocess.CompletedProcess[str]], checkout: Path) -> None:
    text = (checkout / "README.md").read_text(encoding="utf-8")
    (snippet,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "pflbench.run(" in block]
    done = call("-c", f"{snippet}\nprint(pflbench.__file__)")
    assert (done.returncode, done.stderr) == (0, "")
    *_, keys, file = done.stdout.splitlines()
    assert "head.weight" in keys
    assert file == str(checkout / "pflbench" / "__init__.py")
    assert list((checkout / "runs").glob("*/run.json"))


def test_the_command_line_runs(call: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = call("-m", "pflbench", "list", "algorithms")
    assert (done.returncode, done.stderr) == (0, "")
    assert {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")} == {
        name for name in registry.algorithms() if (ROOT / "algorithms" / f"{name.replace('-', '_')}.py").exists()
    }
    done = call("-m", "pflbench", "--version")
    assert (done.returncode, done.stdout) == (0, "pflbench of a checkout that is not installed\n")


def test_pytest_runs_the_tests(call: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = call("-m", "pytest", "-q", "tests/test_ids.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE)
