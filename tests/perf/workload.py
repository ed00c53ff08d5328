"""The work that is timed: W is 20 clients, Dirichlet 0.1, 45,000 training images of 3x32x32 and 15,000 for testing."""

import numpy as np

from pflbench import Federation, RunSpec
from pflbench.datasets.dataset import Dataset
from pflbench.datasets.partitioners import make

FULL = 60_000
CLASSES = 10


def federation(images: int = FULL, clients: int = 20) -> Federation:
    """Return W, or the same with fewer images. Their pixels are noise: nothing here depends on what they show."""
    random = np.random.RandomState(0)
    x = random.randint(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    y = random.randint(0, CLASSES, images)
    data = Dataset("noise", tuple(map(str, range(CLASSES))), x, y, images)
    spec = RunSpec(alpha=0.1, clients=clients, join_ratio=1.0, min_samples=4).normalised()
    parts = make(y, images, CLASSES, **spec.partition_settings())
    return Federation.from_dataset(data, parts)
