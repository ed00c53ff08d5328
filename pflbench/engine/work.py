"""The work of clients: jobs, their results, and the class that computes them in any process.

A job carries everything that its result depends on, so any worker can compute it at any time.
"""

import copy
import dataclasses
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from pflbench.core.algorithm import Algorithm, Message, Parts, Setup, Upload
from pflbench.core.client import Client
from pflbench.core.device import CPU, Device, OutOfMemory, Replica
from pflbench.core.params import Params, State, fingerprint, tensor_digest, tensors
from pflbench.core.training import Counts
from pflbench.engine import evaluation
from pflbench.engine.evaluation import Score
from pflbench.engine.experiment import OWN, Experiment
from pflbench.errors import MethodError, RunError
from pflbench.federation import Split
from pflbench.store.states import StateRef, UploadFile, check_state, plain, read, save_state


@dataclasses.dataclass(frozen=True)
class Train:
    """Local training of a client in `round`; `exchange` counts its earlier exchanges with the server in that round."""

    round: int
    client: int
    received: Message
    state: State | StateRef
    exchange: int = 0


@dataclasses.dataclass(frozen=True)
class Trained:
    """The result of training: the upload and its bytes, the client's new state, counts, and the worker's seconds."""

    upload: Upload
    nbytes: int
    state: State | StateRef
    counts: Counts
    seconds: float


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluation of a client after `round`. `global_model` is evaluated, too; `last` is the client's last score."""

    round: int
    client: int
    received: Message
    state: State | StateRef
    global_model: Params | None = None
    last: Score | None = None


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation: the score, the counts of its training, and the worker's seconds."""

    score: Score
    counts: Counts
    seconds: float


Job = Train | Evaluate
Result = Trained | Evaluated


class Work:
    """Computes the jobs of one run.

    With a folder, `states`, each process reads and writes clients' states and uploads there; without one, jobs and
    results carry them.
    """

    def __init__(self, experiment: Experiment, states: Path | None, device: Device = CPU) -> None:
        self.experiment = experiment
        self.states = states
        self.device = device
        self._digests: dict[int, tuple[Tensor, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # The network's parameters and its replica's view of them share memory; copies of them in another process would
        # not. So another process makes its own.
        return {"experiment": self.experiment, "states": self.states, "device": self.device, "_digests": {}}

    @cached_property
    def replica(self) -> Replica:
        """The copy of the network in this process, made when the first job needs it."""
        return Replica(copy.deepcopy(self.experiment.net), self.experiment.spec.precision, self.device)

    @cached_property
    def setup(self) -> Setup:
        """The setup as clients have it: its parameters are on the device."""
        setup, to = self.experiment.setup, self.device.to
        draw = setup.draw
        return dataclasses.replace(
            setup, model=to(setup.model), draw=None if draw is None else lambda seed: to(draw(seed))
        )

    def on(self, device: Device) -> "Work":
        """Return the same work on `device`, with another copy of the network."""
        return Work(self.experiment, self.states, device)

    def size(self, job: Job) -> int:
        """Return roughly how many samples a job passes through the network: the largest jobs are started first."""
        data = self.experiment.federation.clients[job.client]
        epochs = max(self.experiment.spec.local_epochs, 1)
        return len(data.test) if isinstance(job, Evaluate) else 3 * epochs * len(data.train)

    def __call__(self, job: Job) -> Result:
        """Return the result of `job`, at home."""
        try:
            return self._train(job) if isinstance(job, Train) else self._evaluate(job)
        except OutOfMemory:
            raise RunError(
                f"round {job.round}, client {job.client}: the memory of {self.device.torch} is full; "
                "use fewer --workers, or a smaller --batch-size"
            ) from None

    def probe(self) -> str:
        """Return the fingerprint of the run's network after two steps of SGD.

        Two processes with equal probes compute the same bits: processors and libraries differ in rounding. With fewer
        than 16 samples there is one step. If these steps fail, the name of the error is the probe: whether the run
        fails, too, is the jobs' affair.
        """
        experiment = self.experiment
        train = experiment.federation.clients[0].train
        # No short last batch: a network with BatchNorm cannot train on a single sample.
        protocol = dataclasses.replace(experiment.protocol(1), epochs=1, batch_size=8, drop_last=True)
        some = self.device.to(Split(train.x[:16], train.y[:16]))
        client = Client(self.replica, some, self.setup, protocol, seed=0, key=(0, 0))
        try:
            return fingerprint(self.device.home(client.sgd(self.setup.model)))
        except Exception as error:
            return type(error).__name__

    def _client(self, job: Job, *more: int) -> Client:
        experiment = self.experiment
        return Client(
            self.replica,
            self.device.to(experiment.federation.clients[job.client].train),
            self.setup,
            experiment.protocol(job.round),
            seed=experiment.setup.seed,
            key=(job.round, job.client, *more),
        )

    def _state(self, job: Job) -> tuple[Parts, Params | None]:
        """Return the client's state, and its own model if that is tested."""
        state, own = dict(self.device.to(read(job.state, self.states))), None
        if self.experiment.spec.tested == "both":
            own = state.pop(OWN)
        return Parts(state, f"the state of client {job.client}"), own

    def _train(self, job: Train) -> Trained:
        began = time.perf_counter()
        # The first exchange has the same key as in a round with one exchange.
        client = self._client(job, *([job.exchange] if job.exchange else []))
        message, state = self._updated(client, job)
        check_state(message.content, f"the upload of client {job.client}")
        check_state(state, f"the state of client {job.client}")
        state = self.device.home(self.experiment.with_own(state, client.trained))
        upload = Upload(self.device.home(message.content), message.weight, job.client)
        trained = self.kept(job, Trained(upload, upload.nbytes, state, client.counts, 0.0))
        return dataclasses.replace(trained, seconds=time.perf_counter() - began)

    def carried(self, job: Job) -> Job:
        """Return `job` with the client's state itself, for a worker without access to the folder of states."""
        return dataclasses.replace(job, state=read(job.state, self.states))

    def kept(self, job: Train, trained: Trained) -> Trained:
        """Return `trained` as the store keeps it: upload and state in files, or in memory if there is no folder."""
        content, state = trained.upload.content, trained.state
        assert not isinstance(state, StateRef)  # noqa: S101
        new: State | StateRef
        if self.states is None:
            content, new = plain(content), plain(state)
        else:
            new = save_state(state, self.states, f"{job.client:06}-{job.round:06}.safetensors")
            content = UploadFile.write(content, self.states / f"upload-{job.client:06}-{job.exchange}.safetensors")
        return dataclasses.replace(trained, upload=dataclasses.replace(trained.upload, content=content), state=new)

    def _updated(self, client: Client, job: Train) -> tuple[Message, State]:
        """Return the result of the method's `local_update`. Raises `MethodError` unless it is a message and a state."""
        algorithm = self.experiment.algorithm
        found: Any = algorithm.local_update(client, self._received(job), self._state(job)[0])
        match found:
            case (Message() as message, state):
                return message, state
        raise MethodError(
            f"{algorithm.name}: local_update must return a Message and the client's new state; it returned "
            f"{type(found).__name__}"
        )

    def _evaluate(self, job: Evaluate) -> Evaluated:
        began = time.perf_counter()
        client = self._client(job)
        state, own = self._state(job)
        received, of_all = self._received(job), self.device.to(job.global_model)
        self._note_digests(job, {"received": received.content, "global": of_all or {}})
        deployed = self.experiment.algorithm.personalise(client, received, state)
        score = self._score(job, Parts(deployed, "what is deployed"), of_all, own)
        return Evaluated(score, client.counts, time.perf_counter() - began)

    def _score(self, job: Evaluate, deployed: State, global_model: Params | None, own: Params | None) -> Score:
        """Evaluate the client's models, except a model that was evaluated in the last evaluation or just before."""
        algorithm, split = self.experiment.algorithm, self.experiment.federation.clients[job.client].test
        last = job.last
        personal = self._fingerprint(deployed)
        if last is not None and last.models[0] == personal:
            correct, loss = last.correct, last.loss
        else:
            correct, loss = evaluation.test(algorithm.predict, self.replica, deployed, split)
        # How many samples the network alone classifies correctly, by the fingerprint of its parameters.
        known: dict[str | None, int | None] = {}
        if last is not None:
            known |= {last.models[1]: last.global_correct, last.models[2]: last.own_correct}
        if type(algorithm).predict is Algorithm.predict:
            known[personal] = correct
        counts: list[tuple[str | None, int | None]] = []
        for model in (global_model, own):
            name = None if model is None else self._fingerprint({"model": model})
            if model is not None and name not in known:
                network = Algorithm.predict.__get__(algorithm)
                known[name], _ = evaluation.test(network, self.replica, {"model": model}, split)
            counts.append((name, None if model is None else known[name]))
        (of_global, global_correct), (of_own, own_correct) = counts
        return Score(job.client, len(split), correct, loss, global_correct, own_correct, (personal, of_global, of_own))

    def _received(self, job: Job) -> Message:
        """Return the received message on the device."""
        return Message(self.device.to(job.received.content), job.received.weight)

    def _note_digests(self, job: Evaluate, moved: State) -> None:
        """Remember the digests of the tensors that were received: most clients receive the same tensors.

        `moved` has them on the device.
        """
        before, self._digests = self._digests, {}
        received = tensors({"received": job.received.content, "global": job.global_model or {}})
        for tensor, on_device in zip(received, tensors(moved), strict=True):
            known = before.get(id(tensor))
            # The tensor is referenced, so that no other tensor gets its id.
            digest = known[1] if known else tensor_digest(tensor)
            self._digests[id(tensor)] = tensor, digest
            self._digests[id(on_device)] = on_device, digest

    def _fingerprint(self, tree: State) -> str:
        def digest(t: Tensor) -> str:
            return self._digests[id(t)][1] if id(t) in self._digests else tensor_digest(self.device.home(t))

        return fingerprint(tree, digest)
