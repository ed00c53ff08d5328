"""The methods by name: the files of `algorithms/`, and the entry points of other packages.

Names, titles and descriptions are read from the methods' files without importing a method or torch.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

from pflbench import settings
from pflbench.core import description
from pflbench.core.description import Description, UnreadableError
from pflbench.errors import UsageError, unknown

if TYPE_CHECKING:
    from pflbench.core.algorithm import Algorithm

T = TypeVar("T", bound="Algorithm")
GROUP = "pflbench.algorithms"
_FACTS = ("family", "personal", "sent")
_registered: "dict[str, type[Algorithm]]" = {}


@dataclass_transform(kw_only_default=True, frozen_default=True)
def register(name: str) -> "Callable[[type[T]], type[T]]":
    """Return a class decorator that makes a method available as `name`, and a frozen dataclass of its settings.

    In `algorithms/` the file is named like the method, with underscores for hyphens.
    """

    def add(cls: "type[T]") -> "type[T]":
        made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        made.name = name
        _registered[name] = made
        return made

    return add


def _files() -> dict[str, str]:
    """Return the modules of `algorithms/` by method name."""
    spec = importlib.util.find_spec(GROUP)
    assert spec is not None  # noqa: S101
    names = sorted(module.name for module in pkgutil.iter_modules(spec.submodule_search_locations))
    return {name.replace("_", "-"): f"{GROUP}.{name}" for name in names}


def _plugins() -> dict[str, EntryPoint]:
    """Return the entry points of other packages by method name."""
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise UsageError(
                f"the packages of entry points {other.value!r} and {entry.value!r} share the method name "
                f"{entry.name!r}; rename one"
            )
    return found


def _modules() -> dict[str, str]:
    """Return, by method name, the modules of all methods that have a module."""
    files, plugins = _files(), _plugins()
    if clash := files.keys() & plugins.keys():
        name = min(clash)
        raise UsageError(
            f"the package of entry point {plugins[name].value!r} reuses the method name {name!r}; rename it"
        )
    return files | {name: entry.module for name, entry in plugins.items()}


def algorithms() -> dict[str, str]:
    """Return all methods: name and one line that describes it. Raises `UsageError` when two packages share a name."""
    modules, plugins = _modules(), _plugins()
    lines: dict[str, str] = {}
    for name, module in modules.items():
        if name in plugins:
            package = plugins[name].dist
            lines[name] = f"from {package.name if package else plugins[name].value}"
            continue
        try:
            lines[name] = description.docstring(module).partition("\n")[0]
        except UnreadableError:
            lines[name] = "cannot be read: its file is not valid Python"
    lines |= {name: (cls.__doc__ or "").split("\n")[0] for name, cls in _registered.items() if name not in lines}
    return lines


def algorithm(name: str) -> "type[Algorithm]":
    """Return the class of method `name`. Raises `UsageError`, with the nearest name, when there is none."""
    if name not in _registered:
        modules = _modules()
        if name not in modules:
            raise unknown("algorithm", name, algorithms())
        importlib.import_module(modules[name])
        if name not in _registered:
            raise UsageError(f"the package of method {name!r} registers no class of that name; see @register")
    return _registered[name]


def make(name: str, hyperparameters: Mapping[str, Any]) -> "Algorithm":
    """Return method `name` with these hyperparameters, given as values or as text.

    Raises `UsageError` for an unknown name and for a value that cannot be used.
    """
    return settings.build(algorithm(name), hyperparameters, f"hyperparameter of {name}")


def describe(name: str) -> Description:
    """Return the description of method `name`; its module is imported only if the file's text is not enough.

    Raises `UsageError`, with the nearest name, when there is no such method.
    """
    module = _modules().get(name)
    if module is not None:
        with contextlib.suppress(UnreadableError):
            return description.read(module, name)
    cls = algorithm(name)
    text = (module and sys.modules[cls.__module__].__doc__) or cls.__doc__ or ""
    return Description(text.strip(), settings.fields(cls))


def title(name: str) -> str:
    """Return the name that method `name` has in its paper, for example "Per-FedAvg"; `name` if that is not known."""
    return str(facts(name)["title"])


def family(name: str) -> str:
    """Return the family of method `name`; "" if that is not known."""
    return facts(name)["family"] or ""


def facts(name: str) -> dict[str, Any]:
    """Return what method `name` says about itself: title, family, venue, year, personal, sent. None: it does not say.

    Nothing is imported. A method without a file, or one that is not installed, has no facts but its name.
    """
    module, text = _modules().get(name), ""
    if module is not None:
        with contextlib.suppress(UnreadableError):
            text = description.docstring(module)
    said = description.lines(text)
    venue, year = description.published(text) or (None, None)
    rest = {key: said[key.title()].removesuffix(".") if key.title() in said else None for key in _FACTS}
    return {"title": description.title(text) or name, "venue": venue, "year": year, **rest}
