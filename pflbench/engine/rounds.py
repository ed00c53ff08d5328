"""The round loop."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from pflbench.core.algorithm import Message, Parts, Round, Upload
from pflbench.core.params import State
from pflbench.core.training import Counts
from pflbench.engine import evaluation
from pflbench.engine.evaluation import Score
from pflbench.engine.executors.base import Executor
from pflbench.engine.experiment import Experiment
from pflbench.engine.observers import Observer
from pflbench.engine.work import Evaluate, Evaluated, Train, Trained
from pflbench.errors import Diverged, MethodError
from pflbench.participation import participants
from pflbench.store.memory import Log
from pflbench.store.record import Record, Row
from pflbench.store.states import ClientStates, check_state, plain

T = TypeVar("T")


class Rounds:
    """The rounds of one run, in steps.

    Each step trains round t+1 and, in parallel, evaluates round t on all clients. The two are independent; short
    evaluations keep workers busy while one large client still trains.
    """

    def __init__(self, experiment: Experiment, record: Record, pool: Executor, log: Log, observer: Observer) -> None:
        self._experiment = experiment
        self._record = record
        self._pool = pool
        self._log = log
        self._observer = observer
        self._last: dict[int, Score] = {}

    def run(self) -> None:
        """Compute the rounds that the record lacks. If a number is not finite, the run ends with status "diverged"."""
        record = self._record
        try:
            while len(record.rounds) < record.spec.rounds or self._pending():
                self._step()
            record.status = "finished"
        except Diverged as error:
            record.status, record.reason = "diverged", str(error)
        record.fingerprints |= {"metrics": record.metrics_fingerprint(), "states": record.states_fingerprint()}

    def _pending(self) -> bool:
        """Return whether the evaluation of the last round is pending."""
        record, done = self._record, len(self._record.rounds)
        due = done > 0 and (done % record.spec.eval_every == 0 or done == record.spec.rounds)
        return due and not (record.evaluations and record.evaluations[-1]["round"] == done)

    def _step(self) -> None:
        """Evaluate the last round if its evaluation is pending, and train the next round if there is one."""
        record, number = self._record, len(self._record.rounds) + 1
        training = number <= record.spec.rounds
        cohort = _Cohort(
            self._experiment, self._round(number) if training else None, self._states, self._pool,
            self._evaluations() if self._pending() else [],
        )  # fmt: skip
        failure: Exception | None = None
        server = record.server
        with _round_named(number):
            if training:
                assert cohort.round is not None  # noqa: S101
                try:
                    server = self._experiment.algorithm.play(cohort.round, _named(server), cohort)
                except Exception as error:  # raised below, after the evaluation of the previous round
                    failure = error
            results = cohort.evaluated()
        if results:
            self._finish_evaluation(number - 1, results, cohort.evaluation_seconds)
        if failure is not None:
            with _round_named(number):
                raise failure
        if training:
            server = plain(server)
            check_state(server, "the server's state")
            record.server = server
            self._finish_round(cohort)

    def _round(self, number: int) -> Round:
        return Round(number, tuple(participants(self._record.spec, number)), self._experiment.setup)

    def _evaluations(self) -> list[Evaluate]:
        number = len(self._record.rounds)
        round_, algorithm = self._round(number), self._experiment.algorithm
        server = _named(self._record.server)
        model = algorithm.global_model(server)
        if model is not None and model.keys() != self._experiment.setup.model.keys():
            model = None
        return [
            Evaluate(number, c, algorithm.serve(round_, server, c), self._states.stored(c), model, self._last.get(c))
            for c in range(self._record.spec.clients)
        ]

    def _finish_evaluation(self, number: int, results: list[Evaluated | Exception], seconds: float) -> None:
        with _round_named(number):
            good = _good(results)
            scores = [result.score for result in good]
            row: Row = {
                "round": number,
                **evaluation.summary(scores),
                **_work([result.counts for result in good]),
                "seconds": round(seconds, 3),
                "busy_seconds": round(sum(result.seconds for result in good), 3),
            }
        clients = [{"round": number, **evaluation.accuracies(score)} for score in scores]
        self._last = {score.client: score for score in scores}
        self._record.evaluations.append(row)
        self._record.clients.extend(clients)
        self._log.add_evaluation(row, clients)
        self._observer.evaluation(dict(row))

    def _finish_round(self, cohort: "_Cohort") -> None:
        assert cohort.round is not None  # noqa: S101
        counts = [counts for counts, _ in cohort.trained]
        samples = sum(c.samples for c in counts)
        row: Row = {
            "round": cohort.round.number,
            "participants": list(cohort.round.cohort),
            "train_loss": sum(c.loss_sum for c in counts) / samples if samples else None,
            "bytes_up": cohort.bytes_up,
            "bytes_down": cohort.bytes_down,
            **_work(counts),
            "seconds": round(cohort.training_seconds, 3),
            "busy_seconds": round(sum(seconds for _, seconds in cohort.trained), 3),
        }
        self._states.changed.update(cohort.states)
        self._record.rounds.append(row)
        self._log.add_round(row)
        self._log.checkpoint()
        self._observer.round(dict(row))

    @property
    def _states(self) -> ClientStates:
        assert isinstance(self._record.client_states, ClientStates)  # noqa: S101
        return self._record.client_states


class _Cohort:
    """The clients of a round, and the evaluation that runs in parallel with their first exchange."""

    def __init__(
        self,
        experiment: Experiment,
        round: Round | None,
        clients: ClientStates,
        pool: Executor,
        evaluations: list[Evaluate],
    ) -> None:
        self.round = round
        self.states: dict[int, Any] = {}
        self.trained: list[tuple[Counts, float]] = []  # the float: the workers' seconds
        self.bytes_up = 0
        self.bytes_down = 0
        self._experiment = experiment
        self._clients = clients
        self._pool = pool
        self._pending = evaluations
        self._evaluated: list[Evaluated | Exception] = []
        self._exchanges: dict[int, int] = {}
        self._began = time.perf_counter()
        self.evaluation_seconds = 0.0  # wall seconds that belong to the evaluation

    def update(self, server: State, clients: Sequence[int] | None = None) -> list[Upload]:
        """See `pflbench.core.algorithm.Cohort.update`."""
        assert self.round is not None  # noqa: S101
        chosen = sorted(self.round.cohort if clients is None else clients)
        if len(set(chosen)) < len(chosen) or not all(client in range(len(self._clients)) for client in chosen):
            raise MethodError(f"update: the clients {chosen} are not different clients of the federation")
        jobs = [self._job(server, client) for client in chosen]
        self.bytes_down += sum(job.received.nbytes for job in jobs)
        results = self._map(jobs)
        uploads = []
        for job, result in zip(jobs, _good(results), strict=True):
            self.states[job.client] = result.state
            self._exchanges[job.client] = job.exchange + 1
            self.bytes_up += result.nbytes
            self.trained.append((result.counts, result.seconds))
            uploads.append(result.upload)
        return uploads

    def _job(self, server: State, client: int) -> Train:
        assert self.round is not None  # noqa: S101
        sent = self._experiment.algorithm.broadcast(self.round, _named(server), client)
        state = self.states.get(client, self._clients.stored(client))
        received = Message(plain(sent.content), sent.weight)
        return Train(self.round.number, client, received, state, self._exchanges.get(client, 0))

    def _map(self, jobs: list[Train]) -> list[Trained | Exception]:
        """Compute jobs and, in parallel, the pending evaluation, if any."""
        pending, self._pending = self._pending, []
        began = time.perf_counter()
        results = self._pool.map([*pending, *jobs])
        seconds = time.perf_counter() - began
        evaluated, trained = results[: len(pending)], results[len(pending) :]
        self._evaluated += evaluated  # type: ignore[arg-type]
        # Training and evaluation share the wall time of a step in proportion to the workers' time.
        busy, evaluating = (
            sum(r.seconds for r in group if not isinstance(r, Exception)) for group in (results, evaluated)
        )
        self.evaluation_seconds += seconds * evaluating / busy if busy else 0.0
        return trained  # type: ignore[return-value]

    def evaluated(self) -> list[Evaluated | Exception]:
        """Return the results of the evaluation; compute them if no exchange has done so."""
        if self._pending:
            self._map([])
        return self._evaluated

    @property
    def training_seconds(self) -> float:
        """Wall seconds so far that belong to training and to the server."""
        return time.perf_counter() - self._began - self.evaluation_seconds


def _named(server: State) -> State:
    """Return the server's state as `Parts`: a missing part raises an error that names the existing parts."""
    return Parts(server, "the server's state")


def _work(counts: list[Counts]) -> dict[str, int]:
    return {name: sum(getattr(c, name) for c in counts) for name in ("steps", "forward", "backward")}


def _good(results: Sequence[T | Exception]) -> list[T]:
    """Return `results`; raise the first exception among them, in the order of the jobs, not of time."""
    good = []
    for result in results:
        if isinstance(result, Exception):
            raise result
        good.append(result)
    return good


@contextlib.contextmanager
def _round_named(number: int) -> Iterator[None]:
    """Add the round to the message of `Diverged`."""
    try:
        yield
    except Diverged as error:
        raise Diverged(f"round {number}: {error}") from None
