"""Datasets: `resolve` turns the user's name of a dataset into its canonical name, `load` reads that dataset.

The loaders are imported when they are used, so `pflbench --help` imports none of them.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from pflbench.errors import UsageError, unknown

if TYPE_CHECKING:
    from .dataset import Dataset

DATASETS = {
    "auto": "cifar10 where it is on disk or can be downloaded, else synthetic10",
    "cifar10": "CIFAR-10: 60,000 colour photographs of 32x32 in 10 classes (Krizhevsky, 2009)",
    "cifar100": "CIFAR-100: 60,000 colour photographs of 32x32 in 100 classes (Krizhevsky, 2009)",
    "fashion-mnist": "Fashion-MNIST: 70,000 grey images of 28x28 in 10 classes (Xiao et al., 2017)",
    "synthetic10": "12,000 generated colour images of 32x32 in 10 classes, needs no download",
    "synthetic100": "24,000 generated colour images of 32x32 in 100 classes, needs no download",
    "folder:PATH": "your images: PATH/train/<class>/* and PATH/test/<class>/*, all of one size",
}


def default_data_dir() -> Path:
    """Return the folder for downloads and caches: $PFLBENCH_DATA, else the user's cache folder."""
    chosen = os.environ.get("PFLBENCH_DATA")
    return Path(chosen) if chosen else platformdirs.user_cache_path("pflbench")


def resolve(name: str, data_dir: Path, *, notice: Callable[[str], None], download: bool = True) -> str:
    """Return the canonical name of dataset `name`, the only form that `load` takes.

    `auto` becomes `cifar10`, which is downloaded if necessary, or else `synthetic10`, with a line to `notice`. With
    `download=False` the function only checks whether the download would be possible. `folder:PATH` is read, cached in
    `data_dir` and becomes `folder:<last part of PATH>@<fingerprint>`. Every other name is already canonical.

    Raises `UsageError` for an unknown name and for an image tree that cannot be used.
    """
    if name == "auto":
        return _auto(data_dir, notice, download=download)
    if name.startswith("folder:"):
        from . import folder

        return folder.resolve(name.removeprefix("folder:"), data_dir)
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    return name


def load(name: str, data_dir: Path) -> "Dataset":
    """Return the dataset of a canonical `name` (see `resolve`); CIFAR and Fashion-MNIST are downloaded if missing.

    Raises `UsageError` when the files are missing and cannot be downloaded, or are damaged.
    """
    if name in ("cifar10", "cifar100"):
        from . import cifar

        return cifar.load(name, data_dir)
    if name == "fashion-mnist":
        from . import fashion_mnist

        return fashion_mnist.load(data_dir)
    if name in ("synthetic10", "synthetic100"):
        from . import synthetic

        return synthetic.load(name)
    if name.startswith("folder:"):
        from . import folder

        return folder.load(name, data_dir)
    if name == "auto":
        raise UsageError("dataset 'auto' is a choice, not a dataset; resolve it first")
    raise unknown("dataset", name, DATASETS)


def _auto(data_dir: Path, notice: Callable[[str], None], *, download: bool) -> str:
    from . import cifar
    from .download import DownloadError

    try:
        cifar.ensure("cifar10", data_dir, download=download)
    except DownloadError as reason:
        notice(
            f"CIFAR-10 is not in {data_dir} and cannot be downloaded ({reason}): using synthetic10 instead; "
            "--dataset cifar10 says where to put its files"
        )
        return "synthetic10"
    return "cifar10"
