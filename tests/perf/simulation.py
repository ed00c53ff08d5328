"""One round on a cluster as a simulation of discrete events: a driver, and actors of one core each on many nodes.

The driver's CPU, both directions of its network and its disk are lines: who comes first is served first. Nothing here
measures or imports torch; `scale.py` measures the costs, and docs/scale.md explains the result.
"""

import dataclasses
import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Job:
    """One client's job: seconds of the actor, seconds of the driver before and after, bytes down, up, and to disk."""

    compute: float
    send: float = 0.0
    receive: float = 0.0
    down: float = 0.0
    up: float = 0.0
    written: float = 0.0


@dataclasses.dataclass(frozen=True)
class Round:
    """The work of a round. `jobs` are in the order in which they are sent.

    The driver works `before` seconds, then sends `broadcast` bytes to each node; every actor unpacks them in `unpack`
    seconds. After the last result the driver reads `fetched` bytes through its network, and works `after` seconds.
    """

    jobs: Sequence[Job]
    before: float = 0.0
    broadcast: float = 0.0
    unpack: float = 0.0
    fetched: float = 0.0
    after: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cluster:
    """`nodes` of `cores` actors; bytes a second of the driver's network, in each direction, and of its disk.

    `threads` of the driver send and receive; `in_flight` jobs are at most at one actor or on the way to it and back.
    """

    nodes: int
    cores: int
    network: float = math.inf
    disk: float = math.inf
    threads: int = 1
    in_flight: int = 1


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Seconds of a round, and the share of it in which actors, and the driver's CPU, network and disk, are busy.

    `limit` names what would need most of the time if it alone were slow: the round cannot be shorter.
    """

    seconds: float
    actors: float
    driver: float
    network: float
    disk: float
    limit: str


class Line:
    """`servers` equal servers with one queue. `busy` has the seconds in which they work, for one server the sum."""

    def __init__(self, servers: int = 1) -> None:
        self._free = [0.0] * servers
        self.busy = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """Return when a request ends that comes `now`. Requests must come in the order of time."""
        end = max(now, self._free[0]) + seconds
        heapq.heapreplace(self._free, end)
        self.busy += seconds / len(self._free)
        return end

    @property
    def last(self) -> float:
        """When the last request ends."""
        return max(self._free)


def simulate(round: Round, cluster: Cluster) -> Outcome:
    """Return how long a round takes, and what is busy."""
    actors = cluster.nodes * cluster.cores
    driver, down, up, disk = Line(cluster.threads), Line(), Line(), Line()
    events: list[tuple[float, int, Callable[[float], None]]] = []
    waiting = deque(round.jobs)
    inbox: list[deque[Job]] = [deque() for _ in range(actors)]
    working = [False] * actors
    reached: set[int] = set()  # nodes that have the broadcast
    unpacked: set[int] = set()  # actors that have unpacked it
    computed = [0.0] * actors
    done = round.before
    count = 0

    def at(time: float, event: Callable[[float], None]) -> None:
        nonlocal count
        count += 1  # events at the same time happen in the order in which they were made
        heapq.heappush(events, (time, count, event))

    def send(now: float, actor: int) -> None:
        if waiting:
            job = waiting.popleft()
            at(driver.serve(now, job.send), lambda then: transfer(then, actor, job))

    def transfer(now: float, actor: int, job: Job) -> None:
        # Actors are numbered across the nodes. The line delivers in order, so the broadcast is there before the job.
        node = actor % cluster.nodes
        size = job.down + (0.0 if node in reached else round.broadcast)
        reached.add(node)
        at(down.serve(now, size / cluster.network), lambda then: arrive(then, actor, job))

    def arrive(now: float, actor: int, job: Job) -> None:
        inbox[actor].append(job)
        if not working[actor]:
            start(now, actor)

    def start(now: float, actor: int) -> None:
        job = inbox[actor].popleft()
        working[actor] = True
        seconds = job.compute + (0.0 if actor in unpacked else round.unpack)
        unpacked.add(actor)
        computed[actor] += seconds
        at(now + seconds, lambda then: finish(then, actor, job))

    def finish(now: float, actor: int, job: Job) -> None:
        working[actor] = False
        at(up.serve(now, job.up / cluster.network), lambda then: receive(then, actor, job))
        if inbox[actor]:
            start(now, actor)

    def receive(now: float, actor: int, job: Job) -> None:
        at(driver.serve(now, job.receive), lambda then: store(then, actor, job))

    def store(now: float, actor: int, job: Job) -> None:
        nonlocal done
        disk.serve(now, job.written / cluster.disk)
        done = now
        send(now, actor)

    for _ in range(cluster.in_flight):
        for actor in range(actors):
            at(round.before, lambda then, actor=actor: send(then, actor))  # type: ignore[misc]
    while events:
        now, _, event = heapq.heappop(events)
        event(now)
    fetching = round.fetched / cluster.network
    # The system writes files to the disk meanwhile. The next round can begin when the disk has kept up.
    end = max(done + fetching + round.after, disk.last)
    longest = max((job.compute for job in round.jobs), default=0.0)
    needed = {
        "driver": driver.busy + round.before + round.after,
        "network": max(down.busy, up.busy) + fetching,
        "disk": disk.busy,
        "actors": max(sum(computed) / actors, longest + round.unpack),
    }
    return Outcome(
        end,
        sum(computed) / actors / end,
        needed["driver"] / end,
        needed["network"] / end,
        needed["disk"] / end,
        max(needed, key=lambda name: needed[name]),
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """What is sent: bytes; seconds of pickling, unpickling, writing to a file with its hash, and reading + pickling."""

    nbytes: int
    pickle: float
    unpickle: float
    write: float
    fetch: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a method costs on one core, in seconds.

    The driver needs `prepare` for each job, `add` to read an upload and add it to the sum, `checkpoint` for each
    participant. An actor needs `fixed` for a job of training and `step` for each step, `test` for a job of
    evaluation and `sample` for each of its samples.
    """

    broadcast: Part
    state: Part
    upload: Part
    prepare: float
    add: float
    checkpoint: float
    fixed: float
    step: float
    test: float
    sample: float


@dataclasses.dataclass(frozen=True)
class Wire:
    """What a message costs the driver: seconds for each, and for each of its bytes."""

    call: float
    byte: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a round is computed. `shared` is what actors read and write in a shared folder: nothing, "states" or "all".

    With `sums`, each node adds up its clients' uploads and sends one sum. `epochs` of local training in batches of 16.
    `evaluated` clients are evaluated beside the training.
    """

    shared: str = ""
    sums: bool = False
    epochs: int = 5
    evaluated: int = 0


def sizes(clients: int, mean: int, alpha: float = 0.1, classes: int = 10, least: int = 30) -> list[int]:
    """Return the training samples of clients that share each class by Dirichlet(alpha); the same on every call."""
    draws = np.random.RandomState(0).standard_gamma(alpha, (classes, clients))
    shares = (draws / draws.sum(1, keepdims=True)).mean(0)
    return [max(least, round(share * mean * clients)) for share in shares.tolist()]


def plan_round(costs: Costs, sizes: Sequence[int], plan: Plan, wire: Wire, nodes: int) -> Round:
    """Return the round in which clients of these sizes take part."""
    state, upload, epochs = costs.state, costs.upload, plan.epochs
    here = plan.shared == ""  # the driver reads and writes states
    up = (state.nbytes if here else 0) + (0 if plan.shared == "all" or plan.sums else upload.nbytes)
    at_actor = state.unpickle + state.pickle if here else state.fetch + state.write
    send, down, receive, written = wire.call, 0, wire.call + up * wire.byte, 0
    if here:
        send += state.fetch + state.nbytes * wire.byte
        down = state.nbytes
        receive += state.unpickle + state.write
        written += state.nbytes
    fetched, after = 0, len(sizes) * costs.checkpoint
    if plan.sums:  # a node's sums are in float64, twice an upload's bytes
        at_actor += costs.add
        fetched = nodes * 2 * upload.nbytes
        after += nodes * (wire.call + 2 * (upload.nbytes * wire.byte + upload.unpickle) + costs.add)
    elif plan.shared == "all":
        at_actor += upload.write
        fetched = len(sizes) * upload.nbytes
        after += len(sizes) * costs.add
    else:
        at_actor += upload.pickle
        receive += upload.unpickle + upload.write
        written += upload.nbytes
        after += len(sizes) * costs.add
    work = [(3 * epochs * n, costs.fixed + costs.step * epochs * math.ceil(n / 16), True) for n in sizes]
    tests = [math.ceil(sizes[i % len(sizes)] / 3) for i in range(plan.evaluated)]
    work += [(n, costs.test + costs.sample * n, False) for n in tests]
    jobs = [
        Job(seconds + at_actor, send, receive, down, up, written)
        if training
        else Job(seconds + (state.unpickle if here else state.fetch), send, wire.call, down)
        for _, seconds, training in sorted(work, key=lambda job: -job[0])
    ]
    before = len(jobs) * costs.prepare + costs.broadcast.pickle
    return Round(jobs, before, costs.broadcast.nbytes, costs.broadcast.unpickle, fetched, after)
