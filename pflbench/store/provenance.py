"""The provenance of a record: versions, machine, commit, source."""

import contextlib
import hashlib
import importlib.metadata
import inspect
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pflbench.core.algorithm import Algorithm


_PACKAGES = ("core", "engine", "store")  # no result depends on the others


def versions() -> dict[str, str]:
    """Return the versions of everything that results may depend on."""
    names = ("pflbench", "torch", "torchvision", "numpy", "pyarrow", "safetensors")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def outdated(run: Mapping[str, Any], algorithm: "Algorithm") -> str | None:
    """Return how the code that made a record differs from the present code; None if it does not differ.

    `run` has the record's fingerprints and versions, as in run.json; `algorithm` is its method, as installed now.
    """
    if run.get("fingerprints", {}).get("algorithm") != source_fingerprint(algorithm):
        return f"another source of {algorithm.name} or of pflbench"
    was, now = run.get("versions", {}), versions()
    for name in sorted({*was, *now}):
        if was.get(name) != now.get(name):
            return f"{name} {was.get(name, 'absent')} and not {now.get(name, 'absent')}"
    return None


def machine(executor: str, workers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the machine and the execution of a run, and pflbench's commit if it is known.

    `workers` describes the executor's workers.
    """
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "executor": executor,
        **workers,
        "git_commit": _commit(),
    }


def processor() -> str:
    """Return the name of this machine's processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    here = Path(__file__).parents[1]
    if not (here.parent / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return None


def source_fingerprint(algorithm: "Algorithm") -> str:
    """Return the fingerprint of a method's source: the modules of its classes, and all code that computes a run."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *(p for package in _PACKAGES for p in (root / package).rglob("*.py"))]):
        digest.update(path.read_bytes())
    for cls in type(algorithm).__mro__[:-1]:
        try:
            digest.update(inspect.getsource(sys.modules[cls.__module__]).encode())
        except (OSError, TypeError, KeyError):  # defined in a prompt
            digest.update(f"{cls.__module__}.{cls.__qualname__}".encode())
    return digest.hexdigest()
