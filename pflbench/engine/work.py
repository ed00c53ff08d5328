"""The work of clients: jobs, their results, and what computes them in whichever process it is.

A job carries everything that its result depends on, so any worker may take it at any time.
"""

import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from pflbench.core.algorithm import Algorithm, Message, Parts, Upload
from pflbench.core.client import Client
from pflbench.core.device import Replica
from pflbench.core.params import Params, State, fingerprint, tensor_digest, tensors
from pflbench.core.training import Counts
from pflbench.engine import evaluation
from pflbench.engine.evaluation import Score
from pflbench.engine.experiment import Experiment
from pflbench.errors import MethodError
from pflbench.store.states import StateRef, UploadFile, check_state, plain, read, save_state


@dataclasses.dataclass(frozen=True)
class Train:
    """Local training of a client in `round`; `exchange` counts what the server has asked it before in that round."""

    round: int
    client: int
    received: Message
    state: State | StateRef
    exchange: int = 0


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training gave: the upload and its bytes, the client's new state, what was done, and the worker's seconds."""

    upload: Upload
    nbytes: int
    state: State | StateRef
    counts: Counts
    seconds: float


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluation of a client after `round`. `global_model` is there to be tested, too; `last` is the score before."""

    round: int
    client: int
    received: Message
    state: State | StateRef
    global_model: Params | None = None
    last: Score | None = None


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What an evaluation gave: the score, the training inside it, and the worker's seconds."""

    score: Score
    counts: Counts
    seconds: float


Job = Train | Evaluate
Result = Trained | Evaluated


class Work:
    """Computes the jobs of one run.

    With a folder, `states`, clients' states and uploads are read and written there by the process that needs them;
    without, they travel with jobs and results.
    """

    def __init__(self, experiment: Experiment, states: Path | None) -> None:
        self.experiment = experiment
        self.states = states
        self.replica = Replica(copy.deepcopy(experiment.net), experiment.spec.precision)
        self._digests: dict[int, tuple[Tensor, str]] = {}

    def private(self) -> "Work":
        """Return the same work with a network of its own."""
        return Work(self.experiment, self.states)

    def size(self, job: Job) -> int:
        """Return roughly how many samples a job passes through the network: the longest jobs are started first."""
        data = self.experiment.federation.clients[job.client]
        epochs = max(self.experiment.spec.local_epochs, 1)
        return len(data.test) if isinstance(job, Evaluate) else 3 * epochs * len(data.train)

    def __call__(self, job: Job) -> Result:
        """Return the result of `job`."""
        return self._train(job) if isinstance(job, Train) else self._evaluate(job)

    def _client(self, job: Job, *more: int) -> Client:
        experiment = self.experiment
        return Client(
            self.replica,
            experiment.federation.clients[job.client].train,
            experiment.setup,
            experiment.protocol(job.round),
            seed=experiment.setup.seed,
            key=(job.round, job.client, *more),
        )

    def _state(self, job: Job) -> Parts:
        return Parts(read(job.state, self.states), f"the state of client {job.client}")

    def _train(self, job: Train) -> Trained:
        began = time.perf_counter()
        # The first exchange has the key that rounds of one exchange have.
        client = self._client(job, *([job.exchange] if job.exchange else []))
        message, state = self._updated(client, job)
        check_state(message.content, f"the upload of client {job.client}")
        check_state(state, f"the state of client {job.client}")
        content: State = plain(message.content)
        kept: State | StateRef = plain(state)
        if self.states is not None:
            kept = save_state(state, self.states, f"{job.client:06}-{job.round:06}.safetensors")
            path = self.states / f"upload-{job.client:06}-{job.exchange}.safetensors"
            content = UploadFile.write(content, path)
        upload = Upload(content, message.weight, job.client)
        return Trained(upload, message.nbytes, kept, client.counts, time.perf_counter() - began)

    def _updated(self, client: Client, job: Train) -> tuple[Message, State]:
        """Return what the method's `local_update` gives. Raises `MethodError` when it is not a message and a state."""
        algorithm = self.experiment.algorithm
        found: Any = algorithm.local_update(client, job.received, self._state(job))
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
        deployed = self.experiment.algorithm.personalise(client, job.received, self._state(job))
        score = self._score(job, Parts(deployed, "what is deployed"))
        return Evaluated(score, client.counts, time.perf_counter() - began)

    def _score(self, job: Evaluate, deployed: State) -> Score:
        """Test the client's models, except a model that was tested in the last evaluation or just before."""
        algorithm, split = self.experiment.algorithm, self.experiment.federation.clients[job.client].test
        plain = type(algorithm).predict is Algorithm.predict
        global_model, last = job.global_model, job.last
        self._note_digests(job)
        personal = self._fingerprint(deployed)
        of_global = None if global_model is None else self._fingerprint({"model": global_model})
        if last is not None and last.models[0] == personal:
            correct, loss = last.correct, last.loss
        else:
            correct, loss = evaluation.test(algorithm.predict, self.replica, deployed, split)
        if global_model is None:
            globally = None
        elif of_global == personal and plain:
            globally = correct
        elif last is not None and last.models[1] == of_global:
            globally = last.global_correct
        else:
            network = Algorithm.predict.__get__(algorithm)
            globally, _ = evaluation.test(network, self.replica, {"model": global_model}, split)
        return Score(job.client, len(split), correct, loss, globally, (personal, of_global))

    def _note_digests(self, job: Evaluate) -> None:
        """Have the digests of the tensors that were sent at hand: most clients are sent the same ones."""
        before, self._digests = self._digests, {}
        for tensor in tensors({"received": job.received.content, "global": job.global_model or {}}):
            known = before.get(id(tensor))
            self._digests[id(tensor)] = known or (tensor, tensor_digest(tensor))  # held, so that its id stays its own

    def _fingerprint(self, tree: State) -> str:
        return fingerprint(tree, lambda t: self._digests[id(t)][1] if id(t) in self._digests else tensor_digest(t))
