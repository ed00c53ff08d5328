"""CIFAR-10 and CIFAR-100, read and checked by torchvision (Krizhevsky, 2009)."""

from pathlib import Path
from typing import Any

import numpy as np

from pflbench.errors import UsageError

from .dataset import Dataset
from .download import DownloadError, fetch, probe

_TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
_STAND_INS = {"cifar10": "synthetic10", "cifar100": "synthetic100"}


def ensure(name: str, data_dir: Path, *, download: bool = True) -> Path:
    """Return the folder of `name` ("cifar10", "cifar100") in `data_dir`; download it if it is missing.

    With `download=False` the function only checks whether a missing folder could be downloaded. Raises `DownloadError`.
    """
    source = _source(name)
    folder = data_dir / str(source.base_folder)
    if not folder.exists():
        if download:
            fetch(source, source.url, data_dir, source.base_folder)
        else:
            probe(source.url)
    return folder


def load(name: str, data_dir: Path) -> Dataset:
    """Return `name` ("cifar10", "cifar100") from `data_dir`: images [60000, 32, 32, 3], 50,000 of them for training.

    Raises `UsageError` when it is missing and cannot be downloaded, or its files fail torchvision's checksums.
    """
    source = _source(name)
    try:
        folder = ensure(name, data_dir)
    except DownloadError as reason:
        raise UsageError(
            f"{_TITLES[name]} is not in {data_dir} and cannot be downloaded ({reason}): put {source.base_folder} "
            f"(from {source.filename}) into {data_dir} or choose --dataset {_STAND_INS[name]}"
        ) from reason
    try:
        train, test = (source(root=data_dir, train=part, download=False) for part in (True, False))
    except RuntimeError as error:
        raise UsageError(
            f"{folder} is damaged or incomplete (wrong checksum): delete it, then it is downloaded again, or unpack "
            f"{source.filename} into {data_dir} again"
        ) from error
    except OSError as error:
        raise UsageError(f"{folder} cannot be read ({error.strerror}): correct its permissions") from error
    return Dataset(
        name=name,
        classes=tuple(train.classes),
        images=np.ascontiguousarray(np.concatenate([train.data, test.data])),
        labels=np.array(train.targets + test.targets, dtype=np.int64),
        n_train=len(train.targets),
    )


def _source(name: str) -> Any:
    import torchvision.datasets

    return {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
