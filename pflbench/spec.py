"""The description of one run: everything that its results depend on."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pflbench import settings
from pflbench.errors import UsageError, unknown
from pflbench.settings import setting

# The names and meanings are not in models.py, so that they can be listed and checked without importing torch.
MODELS = {
    "cnn": "two 5x5 convolutions with pooling, a 512-unit layer, and the head (McMahan et al., 2017; PFLlib's CNN)",
    "mlp": "one hidden layer of 512 units, and the head",
    "resnet18": "torchvision's ResNet-18 with a 3x3 stem and no first pooling, for small images",
}
PARTITION_SETTINGS: dict[str, dict[str, Any]] = {
    "dirichlet": {"alpha": 0.1, "balanced": False},
    "iid": {"balanced": True},
    "pathological": {"classes_per_client": 2, "balanced": True},
}
_SEEDS = ("partition_seed", "init_seed", "sampling_seed", "order_seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run: data, partition, model, algorithm and its hyperparameters, optimiser, protocol, seed.

    The defaults are FedAS's published example. `None` means that the value follows from another setting, which the
    setting's meaning names. Raises `UsageError` when a value is out of bounds.

    Results do not depend on executor, workers and folders, so they are not part of the spec.
    """

    algo: str = setting("fedas", "the method; `pflbench list algorithms` names them")
    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dataset: str = setting("auto", "the images; `pflbench list datasets` names them")
    split: str = setting(
        "pooled",
        "pooled: train and test images are pooled and each client's share is split 75/25; official: not pooled",
        choices=("pooled", "official", "given"),
    )
    partition: str = setting(
        "dirichlet", "how the samples are distributed to the clients", choices=(*PARTITION_SETTINGS, "given")
    )
    alpha: float | None = setting(None, "Dirichlet concentration, small is uneven (dirichlet: 0.1)", gt=0)
    classes_per_client: int | None = setting(None, "classes that each client has (pathological: 2)", ge=1)
    balanced: bool | None = setting(None, "equal numbers of samples (dirichlet: no; iid, pathological: yes)")
    min_samples: int = setting(40, "the fewest samples a client may have", ge=2)
    clients: int = setting(20, "number of clients", ge=1)
    model: str = setting("cnn", "the network: cnn, mlp or resnet18")
    norm: str | None = setting(
        None, "normalisation layers (resnet18: batch; cnn: none; mlp has none)", choices=("batch", "group")
    )
    join_ratio: float = setting(0.1, "share of the clients that take part in a round", gt=0, le=1)
    rounds: int = setting(40, "communication rounds", ge=1)
    local_epochs: int = setting(5, "epochs of local training in a round", ge=1)
    batch_size: int = setting(16, "samples in a local batch", ge=1)
    lr: float = setting(0.005, "learning rate of local SGD", gt=0)
    momentum: float = setting(0.0, "momentum of local SGD; its buffer starts empty every round", ge=0, le=1)
    weight_decay: float = setting(0.0, "weight decay of local SGD", ge=0)
    lr_decay: float = setting(1.0, "factor on the learning rate after every round", gt=0, le=1)
    shuffle: bool = setting(True, "shuffle a client's samples before every epoch")
    drop_last: bool = setting(False, "drop an incomplete last batch (unless it is the only one)")
    eval_every: int = setting(1, "evaluate every k rounds, and after the last", ge=1)
    tested: str = setting(
        "deployed",
        "which models an evaluation tests: deployed, or both: also each client's own model, as its last local training "
        "left it",
        choices=("deployed", "both"),
        later=True,
    )
    precision: str = setting(
        "fp32", "number format of activations; parameters and sums stay fp32", choices=("fp32", "bf16")
    )
    seed: int = setting(0, "covers partition, initial parameters, client sampling and batch order", ge=0)
    partition_seed: int | None = setting(None, "seed of the partition alone (seed)", ge=0)
    init_seed: int | None = setting(None, "seed of the initial parameters alone (seed)", ge=0)
    sampling_seed: int | None = setting(None, "seed of the client sampling alone (seed)", ge=0)
    order_seed: int | None = setting(None, "seed of the batch order alone (seed)", ge=0)

    def __post_init__(self) -> None:
        settings.normalise(self)
        if self.joining < 1:
            raise UsageError(
                f"join_ratio: {self.join_ratio} of {self.clients} clients leaves no client; "
                f"it must be at least {1 / self.clients:.4g}"
            )

    @property
    def joining(self) -> int:
        """Number of clients that take part in a round."""
        return round(self.join_ratio * self.clients)

    def seed_of(self, name: str) -> int:
        """Return the seed of "partition", "init", "sampling" or "order"."""
        found: int | None = getattr(self, f"{name}_seed")
        return self.seed if found is None else found

    def value(self, name: str) -> Any:
        """Return the value of setting `name` with which the run is computed: never None where a default follows."""
        if name in _SEEDS:
            return self.seed_of(name.removesuffix("_seed"))
        return getattr(self.normalised(own_model=True), name)

    def partition_settings(self) -> dict[str, Any]:
        """Return the settings of the partition, as arguments of `pflbench.datasets.partitioners.make`."""
        names = ("partition", "clients", "alpha", "classes_per_client", "min_samples", "split")
        rest = {"balanced": bool(self.balanced), "seed": self.seed_of("partition")}
        return {name: getattr(self, name) for name in names} | rest

    def describe_partition(self) -> str:
        """Return clients and partition in a few words."""
        detail = self.alpha if self.alpha is not None else self.classes_per_client
        return f"{self.clients} clients, {self.partition}" + ("" if detail is None else f" {detail:g}")

    def normalised(self, *, own_model: bool = False) -> "RunSpec":
        """Return the same run in its canonical form, so that equal runs have equal ids.

        Settings of the partition and the model get their defaults; a seed that equals the common seed is dropped. With
        `own_model`, the model is the user's and may have any name.
        Raises `UsageError` for a setting that the chosen partition or model does not use.
        """
        if self.model not in MODELS and not own_model:
            raise unknown("model", self.model, MODELS)
        changes: dict[str, Any] = {name: None for name in _SEEDS if getattr(self, name) == self.seed}
        used = PARTITION_SETTINGS.get(self.partition, {})
        for name in ("alpha", "classes_per_client", "balanced"):
            value = getattr(self, name)
            if name in used:
                changes[name] = used[name] if value is None else value
            elif value is not None:
                raise UsageError(f"{name}: the partition {self.partition!r} does not use it; leave it out")
        if self.model == "resnet18":
            changes["norm"] = self.norm or "batch"
        elif self.norm is not None and self.model != "cnn":
            raise UsageError(f"norm: the model {self.model!r} has no normalisation layers; leave it out")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values for JSON."""
        return {**dataclasses.asdict(self), "hyperparameters": dict(self.hyperparameters)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunSpec":
        """Return the spec with these settings; all other settings have their defaults.

        Raises `UsageError` for an unknown name, with a suggestion, and for a value that cannot be read.
        """
        rest = {k: v for k, v in values.items() if k != "hyperparameters"}
        hyperparameters = dict(values.get("hyperparameters", {}))
        return dataclasses.replace(settings.build(cls, rest, "setting"), hyperparameters=hyperparameters)

    def run_id(self, known: "Mapping[str, dataclasses.Field[Any]]") -> str:
        """Return the id of the resolved run: the first 12 hex digits of the SHA-256 of its settings.

        `known` has the hyperparameters of its method, as `pflbench.settings.fields` returns them.
        """
        declared = settings.fields(type(self))
        values = settings.identity({name: getattr(self, name) for name in declared}, declared)
        values["hyperparameters"] = settings.identity(self.hyperparameters, known)
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]
