"""Generated images, which need no download: the same bits on every machine, and so cheap that they are not cached.

A class is a pair of patches: both appear in each of its images, at random places and contrasts, over clouds,
distractors and noise. So a single pixel has little information (a linear model fails), every class shares its patches
with others (clients gain from each other's features), and a small convolutional network can learn the classes.
"""

from itertools import combinations, islice

import numpy as np
import numpy.typing as npt

from pflbench.rng import rng

from .dataset import Dataset

_Images = npt.NDArray[np.int16]

# Name: classes, parts, training images, test images.
_SIZES = {"synthetic10": (10, 5, 10_000, 2_000), "synthetic100": (100, 15, 20_000, 4_000)}

_SIDE = 32
_PART, _DISTRACTOR = 12, 6  # sides of the square patches, in pixels
_DISTRACTORS = (32, 2)  # their number in all, and in an image
_CONTRAST = 90  # of patches, in grey levels
_CLOUDS = 40
_NOISE = 2
_GAIN = (8, 17)  # in sixteenths
_CHUNK = 2_000  # images at a time, so that the intermediate arrays are small


def load(name: str) -> Dataset:
    """Return `synthetic10` (12,000 images) or `synthetic100` (24,000): [N, 32, 32, 3], equally many of each class.

    The content depends on the name alone, not on a run's seed. All draws and calculations use integers (the one product
    in float32 is below 2**24, so it is exact): no machine can round differently.
    """
    classes, n_parts, n_train, n_test = _SIZES[name]
    random = rng(0, "synthetic", name)
    pairs = np.array(list(islice(combinations(range(n_parts), 2), classes)))
    parts = _patches(random, n_parts, _PART)
    distractors = _patches(random, _DISTRACTORS[0], _DISTRACTOR)
    labels = np.arange(n_train + n_test, dtype=np.int64) % classes

    images = np.empty((len(labels), _SIDE, _SIDE, 3), dtype=np.uint8)
    for start in range(0, len(labels), _CHUNK):
        chosen = pairs[labels[start : start + _CHUNK]]
        canvas = 128 + _clouds(random, len(chosen))
        for _ in range(_DISTRACTORS[1]):
            _paste(random, canvas, distractors[_integers(random, 0, len(distractors), len(chosen))])
        for column in chosen.T:
            gain = _integers(random, *_GAIN, len(chosen)).astype(np.int16)
            _paste(random, canvas, parts[column] * gain[:, np.newaxis, np.newaxis, np.newaxis] // 16)
        canvas += _noise(random, canvas.shape)
        images[start : start + _CHUNK] = canvas.clip(0, 255).transpose(0, 2, 3, 1)
    return Dataset(name, tuple(f"{a}+{b}" for a, b in pairs), images, labels, n_train)


def _integers(random: np.random.RandomState, low: int, high: int, *shape: int) -> npt.NDArray[np.int32]:
    # The type is given because its default, and so the drawn numbers, differ between platforms.
    return random.randint(low, high, size=shape, dtype=np.int32)


def _patches(random: np.random.RandomState, n: int, side: int) -> _Images:
    """Return [n, 3, side, side]: squares of 2x2 cells, each colour of a cell either brighter or darker."""
    cells = (2 * _integers(random, 0, 2, n, 3, 2, 2) - 1) * _CONTRAST
    return cells.repeat(side // 2, axis=2).repeat(side // 2, axis=3).astype(np.int16)


def _clouds(random: np.random.RandomState, n: int) -> _Images:
    """Return [n, 3, 32, 32]: bilinear between 5x5 random nodes, 8 pixels apart."""
    pixel = np.arange(_SIDE)[:, np.newaxis]
    tent = np.maximum(8 - np.abs(pixel - 8 * np.arange(5)), 0)
    weights = np.kron(tent, tent).astype(np.float32)
    nodes = _integers(random, -_CLOUDS, _CLOUDS + 1, n * 3, 25).astype(np.float32)
    return ((nodes @ weights.T).astype(np.int16) >> 6).reshape(n, 3, _SIDE, _SIDE)


def _paste(random: np.random.RandomState, canvas: _Images, patches: _Images) -> None:
    """Add `patches[i]` to `canvas[i]` at a random place."""
    n, _, _, side = patches.shape
    y, x = _integers(random, 0, _SIDE - side + 1, 2, n, 1, 1, 1)
    offsets = np.arange(side)
    image = np.arange(n).reshape(n, 1, 1, 1)
    channel = np.arange(3).reshape(3, 1, 1)
    canvas[image, channel, y + offsets[:, np.newaxis], x + offsets] += patches


def _noise(random: np.random.RandomState, shape: tuple[int, ...]) -> _Images:
    # The sum of the two halves of a random byte: a triangular distribution from one draw.
    drawn = random.randint(0, 256, size=shape, dtype=np.uint8)
    return ((drawn & 15) + (drawn >> 4)).astype(np.int16) * _NOISE - 15 * _NOISE
