"""Random numbers that depend only on their key.

Every draw in a run comes from a generator keyed by (seed, stream, round, client, ...). So it does not depend on the
order in which clients are computed, or on the number of workers.
"""

import hashlib

import numpy as np


def rng(seed: int, *key: str | int) -> np.random.RandomState:
    """Return a generator for `key`, independent of the generators of all other keys.

    `RandomState` and not `Generator`: NEP 19 freezes its streams, so a seed gives the same partition and the same
    batches with every NumPy release, on every machine.
    """
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))
