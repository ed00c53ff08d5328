"""Fashion-MNIST from its IDX files (Xiao, Rasul and Vollgraf, 2017, arXiv:1708.07747)."""

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pflbench.errors import UsageError

from .dataset import Dataset
from .download import DownloadError, fetch

# The folder of Debian's and Ubuntu's package dataset-fashion-mnist, with the four files.
SYSTEM_DIR = Path("/usr/share/datasets/fashion-mnist")

_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_PARTS = ("train", "t10k")
_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


def load(data_dir: Path) -> Dataset:
    """Return Fashion-MNIST: images [70000, 28, 28, 1], 60,000 of them for training.

    It is read from `data_dir`/FashionMNIST/raw (torchvision's layout, packed or not), else from `SYSTEM_DIR`, else
    downloaded. Raises `UsageError` when it is missing and cannot be downloaded, or its files are damaged.
    """
    folder = _folder(data_dir)
    # Debian compresses the same content again, so torchvision's checksums of the packed files do not hold there.
    checksums = {} if folder == SYSTEM_DIR else dict(_source().resources)
    images, labels = [], []
    for part in _PARTS:
        images.append(_idx(folder, f"{part}-{_IMAGES}", 3, checksums))
        labels.append(_idx(folder, f"{part}-{_LABELS}", 1, checksums))
        if images[-1].shape != (len(labels[-1]), 28, 28) or labels[-1].max(initial=0) >= len(_CLASSES):
            raise UsageError(
                f"{folder}/{part}-{_IMAGES} {images[-1].shape} and its labels {labels[-1].shape} do not fit together: "
                "delete the folder, then it is downloaded again"
            )
    return Dataset(
        name="fashion-mnist",
        classes=_CLASSES,
        images=np.concatenate(images)[..., np.newaxis],
        labels=np.concatenate(labels).astype(np.int64),
        n_train=len(labels[0]),
    )


def _folder(data_dir: Path) -> Path:
    raw = data_dir / "FashionMNIST" / "raw"
    if raw.exists():
        return raw
    if SYSTEM_DIR.exists():
        return SYSTEM_DIR
    source = _source()
    try:
        fetch(source, source.mirrors[0] + source.resources[0][0], data_dir, "FashionMNIST")
    except DownloadError as reason:
        raise UsageError(
            f"Fashion-MNIST is neither in {raw} nor in {SYSTEM_DIR} and cannot be downloaded ({reason}): put its four "
            "idx-ubyte.gz files into one of them (apt install dataset-fashion-mnist) or choose --dataset synthetic10"
        ) from reason
    return raw


def _idx(folder: Path, name: str, dimensions: int, checksums: dict[str, str]) -> npt.NDArray[np.uint8]:
    """Return one IDX file of unsigned bytes: `name`.gz if it exists, else `name`."""
    path = folder / f"{name}.gz"
    try:
        if path.exists():
            packed = path.read_bytes()
            wanted = checksums.get(path.name)
            if wanted and hashlib.md5(packed, usedforsecurity=False).hexdigest() != wanted:
                raise ValueError("wrong checksum")
            data = gzip.decompress(packed)
        else:
            path = folder / name
            data = path.read_bytes()
        return _parse(data, dimensions)
    except FileNotFoundError as error:
        raise UsageError(f"{path}[.gz] is missing: delete {folder}, then it is downloaded again") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UsageError(f"{path} is damaged ({error}): delete {folder}, then it is downloaded again") from error


def _parse(data: bytes, dimensions: int) -> npt.NDArray[np.uint8]:
    # IDX: 0, 0, type 8 (unsigned byte), number of dimensions; the dimensions as big-endian uint32; the bytes.
    header = 4 + 4 * dimensions
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) < header:
        raise ValueError("not an IDX file of unsigned bytes")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dimensions, offset=4))
    values = np.frombuffer(data, np.uint8, offset=header)
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{values.size} values where its header says {shape}")
    return values.reshape(shape)


def _source() -> Any:
    import torchvision.datasets

    return torchvision.datasets.FashionMNIST
