"""The methods by name: the files of `algorithms/`, and other packages' entry points.

Names and one-line descriptions are found without importing a method, hence without importing torch.
"""

import ast
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pflbench.errors import UsageError, unknown

if TYPE_CHECKING:
    from pflbench.core.algorithm import Algorithm

T = TypeVar("T", bound="type[Algorithm]")
GROUP = "pflbench.algorithms"
_registered: "dict[str, type[Algorithm]]" = {}


def register(name: str) -> Callable[[T], T]:
    """Return a class decorator that makes a method available as `name`.

    In `algorithms/` the file is named like the method, with underscores for hyphens.
    """

    def add(cls: T) -> T:
        cls.name = name
        _registered[name] = cls
        return cls

    return add


def _files() -> dict[str, Path]:
    spec = importlib.util.find_spec(GROUP)
    assert spec is not None  # noqa: S101
    folders = list(spec.submodule_search_locations or [])
    modules = [m.name for m in pkgutil.iter_modules(folders)]
    return {name.replace("_", "-"): Path(folders[0]) / f"{name}.py" for name in sorted(modules)}


def _plugins() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise UsageError(
                f"the packages of entry points {other.value!r} and {entry.value!r} share the method name "
                f"{entry.name!r}; rename one"
            )
    return found


def algorithms() -> dict[str, str]:
    """Return all methods: name and one line that describes it. Raises `UsageError` when two packages share a name."""
    files, plugins = _files(), _plugins()
    if clash := files.keys() & plugins.keys():
        name = min(clash)
        raise UsageError(
            f"the package of entry point {plugins[name].value!r} reuses the method name {name!r}; rename it"
        )
    lines = {name: _first_line(path) for name, path in files.items()}
    lines |= {name: f"from {entry.dist.name if entry.dist else entry.value}" for name, entry in plugins.items()}
    lines |= {name: (cls.__doc__ or "").split("\n")[0] for name, cls in _registered.items() if name not in lines}
    return lines


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def algorithm(name: str) -> "type[Algorithm]":
    """Return the class of method `name`. Raises `UsageError` when there is none, with the nearest name."""
    if name not in _registered:
        known = algorithms()
        if name not in known:
            raise unknown("algorithm", name, known)
        plugin = _plugins().get(name)
        importlib.import_module(plugin.module if plugin else f"{GROUP}.{name.replace('-', '_')}")
        if name not in _registered:
            raise UsageError(f"the package of method {name!r} registers no class of that name; see @register")
    return _registered[name]
