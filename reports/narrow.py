"""Runs with chosen settings."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pflbench import settings
from pflbench.core import registry
from pflbench.errors import UsageError, unknown
from pflbench.spec import RunSpec

Where = Mapping[str, Sequence[Any]]
"""Values by setting, as texts or in the setting's type."""


def narrow(runs: Mapping[str, RunSpec], where: Where) -> list[str]:
    """Return the names of the `runs` that have, of each setting in `where`, one of its values.

    A seed that is not set has the value of the common seed. The fingerprint of a folder of images may be left out.
    Raises `UsageError` for an unknown setting or method, for a value of another type, and when no run is left.
    """
    known = settings.fields(RunSpec)
    for name in where:
        if name not in known:
            raise unknown("setting", name, known)
    wanted = {name: [_parsed(name, value) for value in values] for name, values in where.items()}
    seen = {name: {_value(spec, name) for spec in runs.values()} for name in wanted}
    for algo in wanted.get("algo", ()):
        if algo not in seen["algo"] and algo not in (methods := registry.algorithms()):
            raise unknown("method", algo, sorted({*methods, *seen["algo"]}))
    left = [name for name, spec in runs.items() if all(_has(spec, key, values) for key, values in wanted.items())]
    if not left:
        chosen = " and ".join(f"{name} {_words(values, ' or ')}" for name, values in wanted.items())
        there = "; ".join(f"{name} {_words(sorted(values, key=_order), ', ')}" for name, values in seen.items())
        raise UsageError(f"where: no run has {chosen}; the runs have {there}")
    return left


def _parsed(name: str, value: Any) -> Any:
    optional = settings.kind(RunSpec, name)[1]
    return None if optional and value == "none" else settings.parse(RunSpec, name, value)


def _value(spec: RunSpec, name: str) -> Any:
    found = spec.value(name)
    return found.partition("@")[0] if name == "dataset" else found


def _has(spec: RunSpec, name: str, values: Sequence[Any]) -> bool:
    return _value(spec, name) in values or getattr(spec, name) in values


def _words(values: Iterable[Any], between: str) -> str:
    return between.join("none" if value is None else str(value) for value in values)


def _order(value: Any) -> tuple[bool, str, float]:
    number = isinstance(value, int | float)
    return number, "" if number else str(value), value if number else 0
