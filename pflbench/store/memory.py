"""What a store is, and the store that writes nothing: states and uploads stay in memory."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pflbench.store.record import Record, Row
from pflbench.store.states import ClientStates

if TYPE_CHECKING:
    from pflbench.core.algorithm import Algorithm
    from pflbench.core.params import State

Notice = Callable[[str], None]


class Log(Protocol):
    """Where a run writes its rows and checkpoints."""

    @property
    def states(self) -> Path | None:
        """The folder of states and uploads; None if they stay in memory."""
        ...

    def add_round(self, row: Row) -> None:
        """Add a round's line."""
        ...

    def add_evaluation(self, row: Row, clients: list[Row]) -> None:
        """Add an evaluation's line, and the lines of its clients."""
        ...

    def checkpoint(self) -> None:
        """Make sure that the run can be resumed after its last round."""
        ...

    def finish(self) -> None:
        """Complete the record."""
        ...


class Store(Protocol):
    """Stores records."""

    def find(self, run: str, algorithm: "Algorithm", notice: Notice) -> Record | None:
        """Return the record of `run` if the run needs no computing, else None."""
        ...

    def open(
        self, record: Record, algorithm: "Algorithm", initial: "State", notice: Notice
    ) -> contextlib.AbstractContextManager[Log | Record]:
        """Return the context in which the run is computed: it gives the log, or the record if it has appeared."""
        ...


class Memory:
    """Stores nothing on disk."""

    def find(self, run: str, algorithm: "Algorithm", notice: Notice) -> Record | None:  # noqa: ARG002
        """Return None: every run is computed."""
        return None

    @contextlib.contextmanager
    def open(self, record: Record, algorithm: "Algorithm", initial: "State", notice: Notice) -> Iterator[Log | Record]:  # noqa: ARG002
        """Yield a log that writes nothing."""
        record.client_states = ClientStates(record.spec.clients, initial, {}, None)
        yield _Silent()


class _Silent:
    states: Path | None = None

    def add_round(self, row: Row) -> None:
        pass

    def add_evaluation(self, row: Row, clients: list[Row]) -> None:
        pass

    def checkpoint(self) -> None:
        pass

    def finish(self) -> None:
        pass
