"""Resolved runs: the only module that combines defaults, data, network and method."""

import copy
import dataclasses
import hashlib
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pflbench.core import params, registry
from pflbench.core.algorithm import Algorithm, Setup
from pflbench.core.device import Replica, has_bf16
from pflbench.core.models import Net, build_model
from pflbench.core.params import Params, State
from pflbench.core.training import SGD
from pflbench.errors import MethodError, UsageError
from pflbench.federation import Federation
from pflbench.settings import fields
from pflbench.spec import RunSpec
from pflbench.store.memory import Notice
from pflbench.store.provenance import source_fingerprint
from pflbench.store.states import check_state

if TYPE_CHECKING:
    from pflbench.datasets.dataset import Dataset

OWN = "own_model"
"""The part of a client's stored state with its own model, if that is tested; the method does not see it."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run, ready to be computed: its resolved spec, its method, its data and its network.

    Data and network are made when they are first used: a run's id needs neither.
    """

    spec: RunSpec
    algorithm: Algorithm
    data_dir: Path
    given_federation: Federation | None = dataclasses.field(default=None, repr=False)
    given_model: Net | None = dataclasses.field(default=None, repr=False)

    @cached_property
    def id(self) -> str:
        """The name of the run's folder, a hash of its settings."""
        return self.spec.run_id(fields(type(self.algorithm)))

    @cached_property
    def federation(self) -> Federation:
        """The clients and their samples. Raises `UsageError` when the partition is impossible."""
        return self.given_federation or load_federation(self.spec, self.data_dir)

    @cached_property
    def net(self) -> Net:
        """The network with the initial parameters. It is never changed."""
        return self.given_model or self._built(self.spec.seed_of("init"))

    @cached_property
    def setup(self) -> Setup:
        """What server and clients know before the first round. Raises `UsageError` when network and data do not fit."""
        net, data = self.net, self.federation
        model = params.read(net)
        return Setup(
            clients=self.spec.clients,
            classes=data.classes,
            features=_probed(net, data, model),
            model=model,
            buffers=frozenset(name for name, _ in net.named_buffers() if name in model),
            seed=self.spec.seed_of("order"),
            draw=partial(_drawn, self),
        )

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprints of data, partition, initial parameters and source."""
        return {
            **self.federation.fingerprints,
            "initial": params.fingerprint(self.setup.model),
            "algorithm": source_fingerprint(self.algorithm),
        }

    def check(self, notice: Notice = lambda _: None, *, device: str = "cpu") -> None:
        """Raise `UsageError` when the run cannot be computed on `device`, a type, before anything is written."""
        self.algorithm.check(self.setup)
        if self.spec.precision == "bf16":
            if others := {str(t.dtype) for t in self.setup.model.values()} - {"torch.float32"}:
                raise UsageError(f"precision: bf16 needs a float32 network; this one has {', '.join(sorted(others))}")
            if not has_bf16(device):
                notice("this processor has no bf16 instructions: bf16 will take several times as long as fp32")

    def protocol(self, number: int) -> SGD:
        """Return how clients train in round `number`."""
        spec = self.spec
        return SGD(
            epochs=spec.local_epochs,
            batch_size=spec.batch_size,
            lr=spec.lr * spec.lr_decay ** (number - 1),
            momentum=spec.momentum,
            weight_decay=spec.weight_decay,
            shuffle=spec.shuffle,
            drop_last=spec.drop_last,
        )

    def init_client(self) -> State:
        """Return a client's first state, as it is stored. Raises `MethodError` when it is not a state."""
        state = self.algorithm.init_client(self.setup)
        check_state(state, "a client's first state")
        return self.with_own(state, self.setup.model)

    def with_own(self, state: State, own: Params) -> State:
        """Return a client's `state` as it is stored: with its own model, if that is tested.

        Raises `MethodError` when the method has trained no whole network, or has a part of that name.
        """
        if self.spec.tested == "deployed":
            return state
        if OWN in state:
            raise MethodError(
                f"{self.spec.algo}: tested=both stores the client's own model as {OWN!r}; rename that part"
            )
        if not own:
            raise MethodError(
                f"{self.spec.algo}: tested=both needs the network of the last local training, but local_update called "
                "neither client.sgd nor client.descend for a whole network"
            )
        return {**state, OWN: dict(own)}

    def _built(self, seed: int) -> Net:
        data = self.federation
        return build_model(self.spec.model, data.shape, data.classes, seed=seed, norm=self.spec.norm)


def prepare(
    spec: RunSpec,
    federation: Federation | None = None,
    model: Net | None = None,
    *,
    data_dir: Path | str | None = None,
    notice: Notice = lambda _: None,
    download: bool = True,
) -> Experiment:
    """Return the run that `spec` describes, with every default resolved: dataset, hyperparameters, partition.

    `federation` replaces the spec's dataset and partition. `model`, a network with `body` and `head`, replaces the
    spec's model, and its parameters are the initial ones. The spec names both by their fingerprints. With
    `download=False` the function only checks whether the dataset could be downloaded. Raises `UsageError` when the run
    is not possible.
    """
    from pflbench import datasets

    folder = datasets.default_data_dir() if data_dir is None else Path(data_dir)
    algorithm = registry.make(spec.algo, spec.hyperparameters)
    changes: dict[str, Any] = {"hyperparameters": dataclasses.asdict(algorithm)}
    if federation is not None:
        digest = federation.fingerprints["data"]
        if "partition" in federation.fingerprints:
            digest = hashlib.sha256((digest + federation.fingerprints["partition"]).encode()).hexdigest()
        changes |= {"dataset": f"{federation.name}@{digest[:12]}", "clients": len(federation.clients)}
        changes |= {"partition": "given", "split": "given", "min_samples": 2}
        changes |= {"alpha": None, "classes_per_client": None, "balanced": None}
    elif "given" in (spec.partition, spec.split):
        raise UsageError("partition, split: 'given' is only for runs with a given federation, from Python")
    if model is not None:
        _check_parts(model)
        digest = hashlib.sha256(f"{model!r} {params.fingerprint(params.read(model))}".encode()).hexdigest()
        changes |= {"model": f"{type(model).__name__}@{digest[:12]}", "norm": None}
        model = copy.deepcopy(model)  # the caller may change the original later
        model.extra = {}
    spec = dataclasses.replace(spec, **changes).normalised(own_model=model is not None)
    if federation is None:
        name = datasets.resolve(spec.dataset, folder, notice=notice, download=download)
        spec = dataclasses.replace(spec, dataset=name)
    return Experiment(spec, algorithm, folder, federation, model)


def load_federation(spec: RunSpec, data_dir: Path) -> Federation:
    """Return the clients that the resolved `spec` describes. Raises `UsageError` when the partition is impossible."""
    return federation_of(spec, load_dataset(spec, data_dir))


def load_dataset(spec: RunSpec, data_dir: Path) -> "Dataset":
    """Return the images of the resolved `spec`."""
    from pflbench import datasets

    return datasets.load(spec.dataset, data_dir)


def federation_of(spec: RunSpec, data: "Dataset") -> Federation:
    """Return the clients of the resolved `spec` and its dataset `data`. Raises `UsageError` as `load_federation`."""
    from pflbench.datasets.partitioners import make

    parts = make(data.labels, data.n_train, len(data.classes), **spec.partition_settings())
    return Federation.from_dataset(data, parts)


def _check_parts(model: nn.Module) -> None:
    """Raise `UsageError` when the user's network has no body or no head."""
    children = [name for name, _ in model.named_children()]
    for part, what in (("body", "whose output are the features"), ("head", "which makes logits of them")):
        if part not in children:
            raise UsageError(
                f"model: {type(model).__name__} has no {part!r}, {what}; its parts are: "
                f"{', '.join(children) or 'none'}; give pflbench.Net(body, head)"
            )


def _probed(net: Net, data: Federation, model: Params) -> int:
    """Return the length of the network's feature vectors; 0 if its features are not vectors.

    Raises `UsageError` when the network cannot take the samples, or has too few outputs.
    """
    replica = Replica(copy.deepcopy(net))
    sample = replica.batch(data.clients[0].train.x, slice(0, 1))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            features, logits = replica.features(model, sample), replica(model, sample)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        hint = "; images are [n, channels, height, width]" if len(data.shape) == 3 else ""
        raise UsageError(f"model: the network cannot take a sample of shape {data.shape}: {reason}{hint}") from None
    if logits.dim() != 2 or logits.shape[1] < data.classes:
        shape = tuple(logits.shape[1:])
        raise UsageError(f"model: the network's outputs have shape {shape}; {data.classes} classes need as many logits")
    return features.shape[1] if features.dim() == 2 else 0


def _drawn(experiment: Experiment, seed: int) -> Params:
    """Return other initial parameters of the experiment's network."""
    if experiment.given_model is None:
        return params.read(experiment._built(seed))
    net = copy.deepcopy(experiment.given_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in net.modules():
            if reset := getattr(module, "reset_parameters", None):
                reset()
            elif any(True for _ in module.parameters(recurse=False)):
                raise UsageError(f"model: {type(module).__name__} has no reset_parameters(), which draws new ones")
    return params.read(net)
