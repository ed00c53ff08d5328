"""Facts of a method that the tests of all methods need. `FACTS` in tests/algorithms/test_<method>.py declares them."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ALGORITHMS = Path(__file__).with_name("algorithms")
BODY, HEAD = 8 * (3 * 4 + 4), 8 * (4 * 3 + 3)  # bytes of the two parts of the toy's network with four features
MODEL = {"": (BODY + HEAD, BODY + HEAD)}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts of a method. The defaults fit a method that trains and exchanges the whole model.

    bytes: what one client sends and receives in one round, by hyperparameters: "" or "name=value name=value". Write it
        with the names BODY and HEAD, or others of the test file: docs/fidelity.md shows the expressions.
    variants: more hyperparameters, in addition to the defaults, with which the contract is tested.
    samples: the number of samples in the training losses of one epoch over 12 samples.
    sensitive: hyperparameters, sizes of the clients and rounds with which every hyperparameter changes the result.
    draws: whether the method uses a random part of the samples, even if they are not shuffled.
    alone: whether a client is evaluated without a message of the server.
    norm: whether the method needs a network with BatchNorm.
    bench: settings with which the benchmark of a round runs the method.
    """

    bytes: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MODEL)
    variants: Sequence[Mapping[str, Any]] = ()
    samples: int = 12
    sensitive: tuple[Mapping[str, Any], Sequence[int], int] = ({}, (24, 40), 2)
    draws: bool = False
    alone: bool = False
    norm: bool = False
    bench: Mapping[str, Any] = field(default_factory=dict)


def path(name: str) -> Path:
    """Return the test file of method `name`."""
    return ALGORITHMS / f"test_{name.replace('-', '_')}.py"


@cache
def declared(name: str) -> Facts | None:
    """Return the facts that the test file of method `name` declares; None if it declares none, or does not exist."""
    file = path(name)
    if not file.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"facts_of_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, "FACTS", None)


def of(name: str) -> Facts:
    """Return the facts of method `name`; the defaults if it declares none."""
    return declared(name) or Facts()
