"""The clients and their samples."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pflbench.errors import UsageError

if TYPE_CHECKING:
    from pflbench.datasets.dataset import Dataset
    from pflbench.datasets.partitioners import Partition


@dataclasses.dataclass(frozen=True)
class Split:
    """Samples `x` [n, ...] (uint8 images are scaled to [-1, 1] when they are used) and labels `y` [n], int64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclasses.dataclass(frozen=True)
class ClientData:
    """One client's samples for training and for evaluation."""

    train: Split
    test: Split


@dataclasses.dataclass(frozen=True)
class Federation:
    """All clients. `name` is the dataset's; `fingerprints` identify samples and partition by their contents."""

    name: str
    clients: tuple[ClientData, ...]
    classes: int
    fingerprints: dict[str, str]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample; images are (channels, height, width)."""
        return tuple(self.clients[0].train.x.shape[1:])

    def counts(self) -> list[dict[str, int]]:
        """Return a row for each client and class with samples: client, class, training samples, test samples."""
        rows = []
        for client, data in enumerate(self.clients):
            train, test = (s.y.bincount(minlength=self.classes).tolist() for s in (data.train, data.test))
            rows += [
                {"client": client, "class": label, "train": a, "test": b}
                for label, (a, b) in enumerate(zip(train, test, strict=True))
                if a or b
            ]
        return rows

    @classmethod
    def from_dataset(cls, dataset: "Dataset", partition: "Partition") -> "Federation":
        """Return the clients of a partitioned dataset. Each client's samples are a view of one common tensor."""

        def gather(parts: Sequence[np.ndarray]) -> list[Split]:
            index = np.concatenate(parts)
            # Stored as [n, height, width, channels]: batches then come out channels-last without a copy.
            x = torch.from_numpy(dataset.images[index]).permute(0, 3, 1, 2)
            y = torch.from_numpy(dataset.labels[index])
            sizes = [len(p) for p in parts]
            return [Split(a, b) for a, b in zip(torch.split(x, sizes), torch.split(y, sizes), strict=True)]

        pairs = zip(gather(partition.train), gather(partition.test), strict=True)
        return cls(
            dataset.name,
            tuple(ClientData(train, test) for train, test in pairs),
            len(dataset.classes),
            {"data": dataset.fingerprint, "partition": partition.fingerprint},
        )

    @classmethod
    def from_arrays(
        cls, clients: Sequence[tuple[Any, Any, Any, Any]], *, classes: int | None = None, name: str = "arrays"
    ) -> "Federation":
        """Return a federation of the user's arrays: for each client (x_train, y_train, x_test, y_test).

        Arrays are NumPy's or torch's. Images are [n, channels, height, width]. `classes` is by default the largest
        label plus one. Raises `UsageError` when lengths, shapes or labels do not fit together.
        """
        if not clients:
            raise UsageError("from_arrays: there is no client; give at least one")
        made = [_client(i, arrays) for i, arrays in enumerate(clients)]
        splits = [s for c in made for s in (c.train, c.test)]
        shapes = {tuple(s.x.shape[1:]) for s in splits}
        if len(shapes) > 1:
            raise UsageError(f"from_arrays: the samples have different shapes: {sorted(shapes)}")
        (shape,) = shapes
        if len(shape) == 3 and shape[2] in (1, 3, 4) and shape[0] not in (1, 3, 4):
            raise UsageError(
                f"from_arrays: samples of shape {shape} look like images [height, width, channels]; give them as "
                "[channels, height, width], for example x.transpose(0, 3, 1, 2)"
            )
        top = max(int(s.y.max()) for s in splits) + 1
        if min(int(s.y.min()) for s in splits) < 0 or (classes is not None and classes < top):
            raise UsageError(f"from_arrays: labels must be 0 to {(classes or top) - 1}")
        digest = hashlib.sha256(f"{classes or top} classes".encode())
        for s in splits:
            digest.update(f"{s.x.dtype} {tuple(s.x.shape)}".encode())
            digest.update(s.x.contiguous().numpy().tobytes() + s.y.numpy().tobytes())
        return cls(name, tuple(made), classes or top, {"data": digest.hexdigest()})


def _client(number: int, arrays: tuple[Any, Any, Any, Any]) -> ClientData:
    """Return a client's samples, checked."""
    if len(arrays) != 4:
        raise UsageError(
            f"from_arrays: client {number} has {len(arrays)} arrays; give x_train, y_train, x_test, y_test"
        )
    x_train, y_train, x_test, y_test = (torch.as_tensor(a).detach() for a in arrays)
    for x, y, subset in ((x_train, y_train, "training"), (x_test, y_test, "test")):
        if y.dim() != 1:
            shape = tuple(y.shape)
            raise UsageError(f"from_arrays: client {number} has {subset} labels of shape {shape}; give one per sample")
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise UsageError(f"from_arrays: client {number} has {subset} labels of type {y.dtype}; give integers")
        if len(x) != len(y) or len(y) == 0:
            raise UsageError(f"from_arrays: client {number} has {len(x)} {subset} samples and {len(y)} labels")
    return ClientData(Split(x_train, y_train.long()), Split(x_test, y_test.long()))
