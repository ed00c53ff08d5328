"""Properties of all settings and all partitions, with examples drawn by Hypothesis."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from pflbench import settings
from pflbench.cli import run
from pflbench.datasets import partitioners
from pflbench.errors import UsageError
from pflbench.spec import RunSpec

# Derandomised: a test gives the same answer every time. No deadline: the machine may be busy.
steady = hypothesis.settings(deadline=None, derandomize=True, max_examples=200)

FIELDS = settings.fields(RunSpec)
TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=8)  # a TOML file holds no others as they are


def values_of(name: str) -> st.SearchStrategy[Any]:
    """Return what a setting may be."""
    kind, optional = settings.kind(RunSpec, name)
    bounds = FIELDS[name].metadata
    low = bounds["ge"] if bounds["gt"] is None else bounds["gt"]
    if bounds["choices"] is not None:
        found: st.SearchStrategy[Any] = st.sampled_from(bounds["choices"])
    elif kind is bool:
        found = st.booleans()
    elif kind is int:
        found = st.integers(low, 2**63 - 1) | st.integers(low, low + 100)
    elif kind is float:
        found = st.floats(low, bounds["le"] or 3.4e38, exclude_min=bounds["gt"] is not None)
    else:
        found = TEXT
    return found | st.none() if optional else found


def joins_anybody(values: Mapping[str, Any]) -> bool:
    """Return whether at least one client takes part in a round, as RunSpec demands of several settings together."""
    return round(values.get("join_ratio", RunSpec.join_ratio) * values.get("clients", RunSpec.clients)) >= 1


GIVEN = st.fixed_dictionaries({}, optional={name: values_of(name) for name in FIELDS}).filter(joins_anybody)
HYPERPARAMETERS = st.dictionaries(TEXT, st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT, max_size=3)


# Settings


@steady
@hypothesis.given(GIVEN, HYPERPARAMETERS)
def test_a_spec_survives_its_dictionary_and_json(given: dict[str, Any], hyperparameters: dict[str, Any]) -> None:
    spec = RunSpec(**given, hyperparameters=hyperparameters)
    assert {name: getattr(spec, name) for name in given} == given
    assert RunSpec.from_dict(spec.to_dict()) == spec
    assert RunSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def as_toml(value: Any) -> str:
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def as_option(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={value}"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "run.toml"


def typed(*args: str) -> RunSpec:
    """Return the run that the command line describes."""
    given = run.command.make_context("run", list(args)).params
    names = ("force", "resume", "log", "dry_run", "quiet", "as_json")
    given = {name: value for name, value in given.items() if name not in names}
    return run.read(given.pop("config"), given.pop("hyperparameters"), given)[0]


@steady
@hypothesis.given(given=GIVEN, hyphens=st.booleans())
def test_a_configuration_file_means_what_the_command_line_means(
    file: Path, given: dict[str, Any], hyphens: bool
) -> None:
    given = {name: value for name, value in given.items() if value is not None}
    lines = [f"{n.replace('_', '-') if hyphens else n} = {as_toml(value)}" for n, value in given.items()]
    file.write_text("\n".join(lines), encoding="utf-8")
    expected = RunSpec(**given)
    assert typed(f"--config={file}") == expected
    assert typed(*(as_option(*item) for item in given.items())) == expected


ANYTHING = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400) | st.lists(st.integers())
)  # fmt: skip


@steady
@hypothesis.given(st.sampled_from(sorted(FIELDS)), ANYTHING | ANYTHING.map(str))
def test_whatever_a_setting_is_given_it_is_within_its_bounds_or_refused_in_one_line(name: str, value: Any) -> None:
    made, refused = None, ""
    try:
        made = getattr(RunSpec.from_dict({name: value}), name)
    except UsageError as error:
        refused = str(error)
    if refused:
        assert name in refused
        assert len(refused.splitlines()) == 1
        return
    kind, optional = settings.kind(RunSpec, name)
    assert type(made) is kind or (made is None and optional)
    bounds = FIELDS[name].metadata
    if made is not None:
        assert bounds["choices"] is None or made in bounds["choices"]
        assert bounds["gt"] is None or made > bounds["gt"]
        assert bounds["ge"] is None or made >= bounds["ge"]
        assert bounds["le"] is None or made <= bounds["le"]


NAMES = st.text("ab-_", min_size=1, max_size=4)


@steady
@hypothesis.given(
    st.recursive(
        st.dictionaries(NAMES, st.integers(0)),
        lambda inner: st.dictionaries(NAMES, inner | st.lists(inner, max_size=2), max_size=3),
        max_leaves=6,
    )
)
def test_a_table_has_each_name_in_one_spelling(table: dict[str, Any]) -> None:
    def twice(value: Any) -> bool:
        if isinstance(value, list):
            return any(map(twice, value))
        if not isinstance(value, dict):
            return False
        return len({name.replace("-", "_") for name in value}) < len(value) or any(map(twice, value.values()))

    def names(value: Any) -> Any:
        return json.loads(json.dumps(value).replace("-", "_"))  # no integer here is negative

    if twice(table):
        with pytest.raises(UsageError, match=r"^suite\.toml: .* leave one out$"):
            settings.underscored(table, Path("suite.toml"))
    else:
        assert settings.underscored(table, Path("suite.toml")) == names(table)


# Partitions


@st.composite
def demands(draw: Callable[..., Any]) -> dict[str, Any]:
    """What `make` is asked for; there are samples enough for all clients."""
    sizes = draw(st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) >= 4))
    labels = np.random.RandomState(draw(st.integers(0, 99))).permutation(np.repeat(np.arange(len(sizes)), sizes))
    split = draw(st.sampled_from(partitioners.SPLITS))
    n_train = draw(st.integers(2, len(labels) - 1))
    rows = len(labels) if split == "pooled" else n_train
    clients = draw(st.integers(1, rows // 2))
    return {
        "labels": labels,
        "n_train": n_train,
        "n_classes": len(sizes),
        "partition": draw(st.sampled_from(sorted(partitioners.PARTITIONS))),
        "clients": clients,
        "alpha": 10 ** draw(st.floats(-6, 6)),
        "classes_per_client": draw(st.integers(1, np.count_nonzero(np.bincount(labels[:n_train])))),
        "balanced": draw(st.booleans()),
        "min_samples": draw(st.integers(0, rows // clients)),
        "split": split,
        "seed": draw(st.integers(0, 2**63 - 1)),
    }


@steady
@hypothesis.given(demands())
def test_a_partition_deals_every_sample_once_and_keeps_the_minimum(demand: dict[str, Any]) -> None:
    draws, refused = [], ""

    def drawn(*args: Any) -> Any:
        draws.append(args)
        return log_dirichlet(*args)

    log_dirichlet = partitioners._log_dirichlet
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitioners, "_log_dirichlet", drawn)
        try:
            made = partitioners.make(**demand)
        except UsageError as error:
            refused = str(error)
    if refused:  # there are samples enough, but perhaps not of each class, or not in the official test set
        assert demand["partition"] == "pathological" or "official test set is too small" in refused
        assert len(refused.splitlines()) == 1
        return
    labels, n_train, n_classes = demand["labels"], demand["n_train"], demand["n_classes"]
    pooled = demand["split"] == "pooled"
    assert len(made.train) == len(made.test) == demand["clients"]
    assert len(draws) <= max(partitioners._DRAWS * n_classes, demand["clients"])

    owned = np.concatenate(made.train + made.test)
    assert len(np.unique(owned)) == len(owned)
    held = np.unique(labels[np.concatenate(made.train + made.test if pooled else made.train)])
    assert np.array_equal(np.sort(owned), np.flatnonzero(np.isin(labels, held)))
    if demand["partition"] != "pathological":
        assert np.array_equal(held, np.unique(labels if pooled else labels[:n_train]))
    for train, test in zip(made.train, made.test, strict=True):
        assert len(train) >= 1
        assert len(test) >= 1
        assert len(train) + (len(test) if pooled else 0) >= demand["min_samples"]
        if not pooled:
            assert train.max() < n_train <= test.min()
    assert partitioners.make(**demand).fingerprint == made.fingerprint
