"""Published figures: what a paper prints for the runs of a suite, to be held against ours."""

import dataclasses
import itertools
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from pflbench.errors import UsageError, unknown
from pflbench.spec import RunSpec

METRICS = (
    "accuracy", "accuracy_mean", "accuracy_worst10", "accuracy_std", "global_accuracy", "own_accuracy",
    "own_accuracy_mean", "own_accuracy_worst10", "own_accuracy_std", "mixed_accuracy", "mixed_accuracy_worst10",
)  # fmt: skip
SELECTIONS = ("last", "last5", "best-test")
"""The figures of a report against which a published one can be held; `pflbench.reports` says what they are."""
_KEYS = ("source", "columns", "row")
_ROW = ("algo", "name", "set", "percent", "metric", "selection", "why")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One published figure.

    `name` is the source's name of the method, None if it is ours. `hyperparameters` are those that the figure's runs
    set, all others have their defaults. `where` has the settings of the figure's column, and `value` is a fraction.
    `settings` has those of the method in which it differs from the suite.
    `metric` and `selection` name our figure against which it is held, and `why` says why, None if it needs no reason.
    """

    algo: str
    name: str | None
    hyperparameters: Mapping[str, Any]
    where: Mapping[str, Any]
    value: float
    metric: str
    selection: str
    why: str | None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Published:
    """The figures of one `source`.

    `columns` are the settings in which the figures of a method differ. `base` has the suite's settings that all
    figures share.
    """

    source: str
    columns: tuple[str, ...]
    figures: tuple[Figure, ...]
    base: Mapping[str, Any]

    @classmethod
    def from_toml(
        cls,
        values: Mapping[str, Any],
        base: Mapping[str, Any],
        where: Path,
        *,
        algorithm: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({}),
    ) -> Self:
        """Return the table [published] of suite file `where`: `values`, with underscores in its names.

        `base` are the suite's settings, `algorithm` those of each method. Raises `UsageError` for an unknown key or
        setting, for no row, for a wrong number of figures, and for a figure that is no percentage.
        """
        noun = f"{where}: published"
        _check(values, _KEYS, noun)
        columns = _get(values, "columns", dict, noun)
        if strange := [name for name, settings in columns.items() if not isinstance(settings, list) or not settings]:
            raise UsageError(f"{noun}: column {strange[0]} must be a list of values, {strange[0]} = [...]")
        shared = {name: value for name, value in base.items() if name != "set" and name not in columns}
        cells = [
            _parsed(shared, dict(zip(columns, cell, strict=True))) for cell in itertools.product(*columns.values())
        ]
        rows = _get(values, "row", list, noun)
        if not rows:
            raise UsageError(f"{noun}: row is empty; a row is a table [[published.row]]")

        def own(algo: Any) -> dict[str, Any]:
            found = dict(algorithm.get(str(algo), {}))
            hyperparameters = {**base.get("set", {}), **found.pop("set", {})}
            return {**_parsed({**shared, **cells[0]}, found), "set": hyperparameters}

        return cls(
            source=_get(values, "source", str, noun),
            columns=tuple(columns),
            figures=tuple(
                figure
                for number, row in enumerate(rows, 1)
                for figure in _figures(row, cells, f"{noun}, row {number}", own)
            ),
            base=_parsed(cells[0], shared),
        )


def _figures(row: Any, cells: list[dict[str, Any]], noun: str, own: Callable[[Any], dict[str, Any]]) -> list[Figure]:
    """Return the figures of a row, one for each of the `cells`, which are the settings of the columns.

    `own` returns the settings of a method in the suite.
    """
    if not isinstance(row, dict):
        raise UsageError(f"{noun}: {row!r} is not a table, [[published.row]]")
    _check(row, _ROW, noun)
    algo = _get(row, "algo", str, noun)
    noun = f"{noun} ({algo})"
    percent = _get(row, "percent", list, noun)
    if len(percent) != len(cells):
        raise UsageError(f"{noun}: percent has {len(percent)} figures, and the columns have {len(cells)} combinations")
    for value in percent:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
            raise UsageError(f"{noun}: percent: {value!r} is not a number from 0 to 100")
    settings = own(algo)
    hyperparameters = settings.pop("set")
    metric, selection = _get(row, "metric", str, noun, "accuracy"), _get(row, "selection", str, noun, "last")
    for what, name, known in (("metric", metric, METRICS), ("selection", selection, SELECTIONS)):
        if name not in known:
            raise unknown(f"{what} in {noun}", name, known)
    return [
        Figure(
            algo=algo,
            name=_get(row, "name", str, noun, None),
            hyperparameters={**hyperparameters, **_get(row, "set", dict, noun, {})},
            where=cell,
            value=value / 100,
            metric=metric,
            selection=selection,
            why=_get(row, "why", str, noun, None),
            settings=settings,
        )
        for cell, value in zip(cells, percent, strict=True)
    ]


def _parsed(others: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in their types. They are checked together with the settings `others`."""
    spec = RunSpec.from_dict({**others, **values})
    return {name: getattr(spec, name) for name in values}


def _check(values: Mapping[str, Any], known: tuple[str, ...], noun: str) -> None:
    for name in values:
        if name not in known:
            raise unknown(f"key in {noun}", name, known)


_NOUNS: dict[type, str] = {str: "text", dict: "a table", list: "a list"}


def _get(values: Mapping[str, Any], name: str, kind: type, noun: str, default: Any = ...) -> Any:
    """Return the value of `name`, which must be of type `kind`; without a `default` it must be there."""
    value = values.get(name, default)
    if value is ...:
        raise UsageError(f"{noun}: {name} is missing")
    if value is not default and not isinstance(value, kind):
        raise UsageError(f"{noun}: {name} must be {_NOUNS[kind]}, not {value!r}")
    return value
