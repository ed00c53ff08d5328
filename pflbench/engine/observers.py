"""Observers: objects that are notified of what happens in a run."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pflbench.engine.experiment import Experiment


class Observer:
    """Is notified of what happens in a run. By default, every method does nothing."""

    def start(self, experiment: "Experiment") -> None:
        """Handle the start of a run, which may be a resumed run."""

    def round(self, row: dict[str, Any]) -> None:
        """Handle a trained round; `row` is its line of rounds.jsonl."""

    def evaluation(self, row: dict[str, Any]) -> None:
        """Handle an evaluation; `row` is its line of evaluations.jsonl."""

    def close(self) -> None:
        """Handle the end of the run, also after an error."""


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def start(self, experiment: "Experiment") -> None:
        """Notify all observers."""
        for observer in self._observers:
            observer.start(experiment)

    def round(self, row: dict[str, Any]) -> None:
        """Notify all observers."""
        for observer in self._observers:
            observer.round(row)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Notify all observers."""
        for observer in self._observers:
            observer.evaluation(row)

    @contextlib.contextmanager
    def watching(self, experiment: "Experiment") -> Iterator[None]:
        """Notify all observers that the run starts, and that it has ended."""
        with contextlib.ExitStack() as stack:
            for observer in self._observers:
                stack.callback(observer.close)
            self.start(experiment)
            yield
