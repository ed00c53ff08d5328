"""The common form of all datasets."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images in memory.

    `images` is uint8 [N, height, width, channels] (0-255, C-contiguous), `labels` is int64 [N] and indexes `classes`.
    The first `n_train` rows are the official training set, the others the official test set.
    """

    name: str
    classes: tuple[str, ...]
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    n_train: int

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of shape, split point, labels and images: equal on every machine for equal content."""
        digest = hashlib.sha256(repr((self.images.shape, self.n_train)).encode())
        digest.update(self.labels.astype("<i8").tobytes())
        digest.update(self.images.data)
        return digest.hexdigest()
