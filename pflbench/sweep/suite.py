"""Suites: the runs of a sweep."""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pflbench.core import registry
from pflbench.errors import UsageError, unknown
from pflbench.published import Published
from pflbench.settings import parse, underscored
from pflbench.spec import RunSpec

_TABLES = {"base": dict, "grid": dict, "algorithm": dict, "include": list, "exclude": list, "published": dict}


def suites() -> dict[str, Path]:
    """Return the files of the ready suites by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "suites").glob("*.toml"))}


@dataclasses.dataclass(frozen=True)
class Suite:
    """A grid of runs.

    Every combination of the lists in `grid` is a run with the settings of `base`. The settings of `algorithm` for the
    run's method override the base, and the grid overrides both. `include` adds runs: each entry's settings override the
    base. `exclude` removes the runs that match all settings of one of its entries. The key `set` holds hyperparameters.
    `published` has the figures of a paper for these runs.
    """

    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    algorithm: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    include: Sequence[Mapping[str, Any]] = ()
    exclude: Sequence[Mapping[str, Any]] = ()
    published: Published | None = None

    @classmethod
    def from_toml(cls, values: Mapping[str, Any], where: Path) -> "Suite":
        """Return the suite in file `where`, which holds `values`.

        Raises `UsageError` for an unknown table, for a table of the wrong shape, for a name in two spellings, and for
        published figures that do not fit their columns.
        """

        def table(settings: Any) -> dict[str, Any]:
            if not isinstance(settings, dict):
                raise UsageError(f"{where}: {settings!r} is not a table of settings")
            return underscored(settings, where)

        for name, value in values.items():
            if name not in _TABLES:
                raise unknown(f"table in {where}", name, _TABLES)
            if not isinstance(value, _TABLES[name]):
                shape = f"tables, [[{name}]]" if _TABLES[name] is list else f"a table, [{name}]"
                raise UsageError(f"{where}: {name} must be {shape}")
        base = table(values.get("base", {}))
        algorithm = {name: table(settings) for name, settings in values.get("algorithm", {}).items()}
        published = values.get("published")
        return cls(
            base=base,
            grid=table(values.get("grid", {})),
            algorithm=algorithm,
            include=[table(entry) for entry in values.get("include", [])],
            exclude=[table(entry) for entry in values.get("exclude", [])],
            published=None
            if published is None
            else Published.from_toml(table(published), base, where, algorithm=algorithm),
        )

    def specs(self) -> list[RunSpec]:
        """Return the runs, each once. Raises `UsageError` for unknown names and impossible values."""
        methods = registry.algorithms() if self.algorithm else {}
        for name in self.algorithm:
            if name not in methods:
                raise unknown("algorithm", name, methods)
        for name, values in self.grid.items():
            if not isinstance(values, list | tuple) or not values:
                raise UsageError(f"grid: {name} must be a list of values, {name} = [...]")
        found: dict[str, RunSpec] = {}
        for values in itertools.product(*self.grid.values()) if self.grid else ():
            given = dict(zip(self.grid, values, strict=True))
            algo = given.get("algo", self.base.get("algo", RunSpec.algo))
            self._add(found, {**self.base, **self.algorithm.get(str(algo), {}), **given})
        for entry in self.include:
            self._add(found, {**self.base, **entry})
        return list(found.values())

    def narrowed(self, options: Mapping[str, Sequence[Any]]) -> list[RunSpec]:
        """Return the runs that remain with `options`, which has the values of each setting that the user has chosen.

        If the setting is in the grid, or differs between the runs, the runs with one of its values remain. All other
        settings are shared by all runs: the values replace the suite's, and each value makes its own runs.
        Raises `UsageError` as `specs` does, and when no run has a value.
        """
        whole = self.specs()
        wanted = {name: [parse(RunSpec, name, value) for value in values] for name, values in options.items()}
        fixed = [name for name in wanted if name in self.grid or len({spec.value(name) for spec in whole}) > 1]
        replaced = {name: values for name, values in wanted.items() if name not in fixed}
        added = [dict(zip(replaced, values, strict=True)) for values in itertools.product(*replaced.values())]
        found = dataclasses.replace(
            self,
            grid={**self.grid, **replaced} if self.grid or not self.include else {},
            include=[{**entry, **more} for entry in self.include for more in added],
        ).specs()
        if not fixed:
            return found
        names = dict.fromkeys(name for name in (*self.grid, *fixed) if name != "set")
        seen = {name: list(dict.fromkeys(spec.value(name) for spec in whole)) for name in names}
        grid = "; ".join(f"{name} {_words(values)}" for name, values in seen.items())
        for name in fixed:
            if strange := [value for value in wanted[name] if value not in seen[name]]:
                raise UsageError(f"{name}: no run of the suite has {strange[0]}; its grid is: {grid}")
            found = [spec for spec in found if spec.value(name) in wanted[name]]
        if not found:
            chosen = " and ".join(f"{name} {_words(wanted[name])}" for name in fixed)
            raise UsageError(f"no run of the suite has {chosen}; its grid is: {grid}")
        return found

    def _add(self, found: dict[str, RunSpec], values: dict[str, Any]) -> None:
        hyperparameters = values.pop("set", {})
        spec = RunSpec.from_dict({**values, "hyperparameters": hyperparameters})
        settings = {**spec.to_dict(), "set": hyperparameters}
        for entry in self.exclude:
            if strange := [name for name in entry if name not in settings]:
                raise unknown("setting in exclude", strange[0], settings)
        if not any(all(settings[name] == value for name, value in entry.items()) for entry in self.exclude):
            found.setdefault(json.dumps(settings, sort_keys=True, default=str), spec)


def _words(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def labels(specs: Sequence[RunSpec]) -> list[str]:
    """Return a few words for each run: its method and the settings that differ among the runs."""
    more = differences(specs, ("algo",))
    return [" ".join([spec.algo, *words]) for spec, words in zip(specs, more, strict=True)]


def differences(specs: Sequence[RunSpec], without: Sequence[str]) -> list[list[str]]:
    """Return for each run "name value" of the settings that differ among the runs, except the settings `without`.

    A hyperparameter is compared among the runs of its method.
    """

    def flat(spec: RunSpec) -> dict[str, str]:
        values = spec.to_dict()
        hyperparameters = values.pop("hyperparameters")
        shared = {name: str(value) for name, value in values.items() if name not in without}
        return shared | {f"{spec.algo} {name}": str(value) for name, value in hyperparameters.items()}

    settings = [flat(spec) for spec in specs]
    seen: dict[str, set[str]] = {}
    for values in settings:
        for name, value in values.items():
            seen.setdefault(name, set()).add(value)
    varying = [name for name, found in seen.items() if len(found) > 1]
    return [[f"{name.split()[-1]} {values[name]}" for name in varying if name in values] for values in settings]
