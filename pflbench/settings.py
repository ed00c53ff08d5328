"""Settings: each is declared once, as a dataclass field with a default, a meaning and bounds.

`RunSpec` and every method are dataclasses of settings. The command line, configuration files, `pflbench describe` and
the error messages all use these fields.
"""

import contextlib
import dataclasses
import functools
import math
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pflbench.errors import UsageError, unknown

T = TypeVar("T")
_LARGEST = {int: 2**63 - 1, float: 3.4e38}  # torch's types: 64-bit integers, 32-bit floating-point numbers
_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def setting(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    choices: Iterable[str] | None = None,
    later: bool = False,
) -> Any:
    """Return a dataclass field: `doc` is its meaning; `ge`, `gt`, `le` and `choices` are its bounds.

    Use `later` for a setting that is added when runs without it are already recorded. To keep their ids, it is part of
    a run's id only if its value is not its default.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "choices": tuple(choices) if choices is not None else None}
    return dataclasses.field(default=default, metadata={"doc": doc, "later": later, **bounds})


def fields(cls: type) -> dict[str, "dataclasses.Field[Any]"]:
    """Return the settings of dataclass `cls` by name (the fields that `setting` made)."""
    return {f.name: f for f in dataclasses.fields(cls) if "doc" in f.metadata}


def kind(cls: type, name: str) -> tuple[type, bool]:
    """Return the type of setting `name` of `cls`, and whether it may be None."""
    hint = _hints(cls)[name]
    if isinstance(hint, types.UnionType):
        (hint,) = [a for a in typing.get_args(hint) if a is not types.NoneType]
        return hint, True
    return hint, False


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Return the types of the fields of `cls`. Cached: reading them takes longer than the rest of a check."""
    return typing.get_type_hints(cls)


def bounds(field: "dataclasses.Field[Any]") -> str:
    """Return the bounds of a setting in words, for example "> 0, <= 1"."""
    m = field.metadata
    if m["choices"]:
        return ", ".join(m["choices"])
    signs = {"gt": ">", "ge": ">=", "le": "<="}
    return ", ".join(f"{sign} {m[key]}" for key, sign in signs.items() if m[key] is not None)


def check(settings: Any) -> None:
    """Raise `UsageError` for the first setting that has the wrong type or is out of bounds."""
    for name, field in fields(type(settings)).items():
        value = getattr(settings, name)
        wanted, optional = kind(type(settings), name)
        if value is None and optional:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if wanted is float and number:
            fits = -math.inf < value < math.inf
        else:
            fits = isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))
        if not fits:
            raise UsageError(f"{name}: {value!r} is not {_NAMES[wanted]}")
        m = field.metadata
        if m["choices"] is not None and value not in m["choices"]:
            raise unknown(name, value, m["choices"])
        low = (m["gt"] is not None and value <= m["gt"]) or (m["ge"] is not None and value < m["ge"])
        if low or (m["le"] is not None and value > m["le"]):
            raise UsageError(f"{name}: {reprlib.repr(value)} is out of bounds; it must be {bounds(field)}")
        if wanted in _LARGEST and abs(value) > _LARGEST[wanted]:
            raise UsageError(f"{name}: {reprlib.repr(value)} is out of bounds; it must be <= {_LARGEST[wanted]}")


def normalise(settings: Any) -> None:
    """Check the settings of a frozen dataclass, and convert integers in float settings: 1 and 1.0 are one run."""
    check(settings)
    for name in fields(type(settings)):
        value = getattr(settings, name)
        if kind(type(settings), name)[0] is float and value is not None:
            object.__setattr__(settings, name, float(value))


def identity(values: Mapping[str, Any], known: "Mapping[str, dataclasses.Field[Any]]") -> dict[str, Any]:
    """Return the settings that make a run's id: all except `later` settings with their default."""
    later = {name: field.default for name, field in known.items() if field.metadata["later"]}
    return {name: value for name, value in values.items() if name not in later or value != later[name]}


def parse(cls: type, name: str, value: Any) -> Any:
    """Return `value`, text from a command line or a value from TOML, in the type of setting `name` of `cls`.

    Raises `UsageError` when it cannot be read as that type. Bounds are not checked here.
    """
    wanted, optional = kind(cls, name)
    if isinstance(value, str) and wanted is not str:
        word = value.strip().lower()
        if optional and word == "none":
            return None
        if wanted is bool and word in ("true", "false"):
            return word == "true"
        if wanted in (int, float):
            try:
                return wanted(word)
            except ValueError:
                pass
        raise UsageError(f"{name}: {value!r} is not {_NAMES[wanted]}")
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # `check` refuses what is too large
            return float(value)
    return value


def build(cls: type[T], values: Mapping[str, Any], noun: str) -> T:
    """Return dataclass `cls` from `values` by name, parsed and checked.

    `noun` is the noun for an unknown key in the error, for example "hyperparameter of fedas".
    """
    known = fields(cls)
    for name in values:
        if name not in known:
            raise unknown(noun, name, known)
    settings = cls(**{name: parse(cls, name, value) for name, value in values.items()})
    check(settings)
    return settings


def underscored(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return the tables of file `where` with underscores instead of hyphens in their names, at every depth.

    Raises `UsageError` when a table has a name in both spellings: one of the two values would be lost.
    """

    def inner(value: Any) -> Any:
        if isinstance(value, dict):
            return underscored(value, where)
        return [inner(part) for part in value] if isinstance(value, list) else value

    out: dict[str, Any] = {}
    for name, value in values.items():
        key = name.replace("-", "_")
        if key in out:
            raise UsageError(f"{where}: {name!r} is set twice, with a hyphen and an underscore; leave one out")
        out[key] = inner(value)
    return out
