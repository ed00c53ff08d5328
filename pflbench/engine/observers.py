"""Who watches a run."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pflbench.engine.experiment import Experiment


class Observer:
    """Is told what happens in a run. Every method does nothing by default."""

    def start(self, experiment: "Experiment") -> None:
        """Note that the run begins, or continues."""

    def round(self, row: dict[str, Any]) -> None:
        """Note a round of training; `row` is its line of rounds.jsonl."""

    def evaluation(self, row: dict[str, Any]) -> None:
        """Note an evaluation; `row` is its line of evaluations.jsonl."""

    def close(self) -> None:
        """Note that the run has ended, in whichever way."""


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def start(self, experiment: "Experiment") -> None:
        """Tell all of them."""
        for observer in self._observers:
            observer.start(experiment)

    def round(self, row: dict[str, Any]) -> None:
        """Tell all of them."""
        for observer in self._observers:
            observer.round(row)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Tell all of them."""
        for observer in self._observers:
            observer.evaluation(row)

    @contextlib.contextmanager
    def watching(self, experiment: "Experiment") -> Iterator[None]:
        """Tell all of them that the run begins, and that it has ended."""
        with contextlib.ExitStack() as stack:
            for observer in self._observers:
                stack.callback(observer.close)
            self.start(experiment)
            yield
