"""Partitioners: they distribute a dataset's samples to the clients.

Every partitioner first decides how many samples of each class each client gets, then draws these samples at random. All
randomness comes from `pflbench.rng.rng(seed, "partition", ...)`.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pflbench.errors import UsageError, unknown
from pflbench.rng import rng

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

PARTITIONS = {
    "dirichlet": "class shares drawn from Dirichlet(alpha): the smaller alpha, the fewer classes a client has",
    "iid": "samples distributed at random: every client has every class",
    "pathological": "a fixed number of classes for each client",
}
SPLITS = ("pooled", "official")

_ALPHA_RANGE = (1e-6, 1e6)
_DRAWS = 20
_SIGMA = 0.5


@dataclass(frozen=True, eq=False)
class Partition:
    """The samples with which each client trains and is evaluated.

    `train` and `test` hold one sorted int64 array of dataset rows for each client. `moved` counts the samples that were
    moved to another client after the draw, so that every client has the minimum (0: the draw was not changed).
    """

    train: tuple[Ints, ...]
    test: tuple[Ints, ...]
    moved: int

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the rows of every client: equal on every machine for an equal partition."""
        digest = hashlib.sha256()
        for parts in (self.train, self.test):
            digest.update(np.array([len(parts), *map(len, parts)], dtype="<i8").tobytes())
            for part in parts:
                digest.update(part.astype("<i8").tobytes())
        return digest.hexdigest()

    def counts(self, labels: Ints, n_classes: int) -> Ints:
        """Return int64 [clients, classes]: how many samples of each class a client has, training and test together."""
        pairs = zip(self.train, self.test, strict=True)
        return np.stack([np.bincount(labels[np.concatenate(pair)], minlength=n_classes) for pair in pairs])


def make(
    labels: Ints,
    n_train: int,
    n_classes: int,
    *,
    partition: str,
    clients: int,
    alpha: float | None = None,
    classes_per_client: int | None = None,
    balanced: bool,
    min_samples: int,
    split: str,
    seed: int,
) -> Partition:
    """Distribute the samples with these `labels` (int64 [N], the first `n_train` are the official training set).

    `partition` is one of `PARTITIONS`; only `dirichlet` uses `alpha`, and only `pathological` uses
    `classes_per_client`. With `balanced` all clients get equal numbers of samples (pathological: all clients with a
    class get equal numbers of its samples). Otherwise the sizes follow from the Dirichlet draw, or from a log-normal
    draw.

    `split` "pooled" distributes all samples and splits each client's share at random into 3/4 training and 1/4 test, at
    least one of each (PFLlib's protocol). "official" distributes the training set, and then the test set such that each
    client's test samples follow the classes of its training samples, at least one for each client.

    Every client gets at least `min_samples` samples before the split, and at least the 2 (pooled) or 1 (official) that
    `split` needs. Every sample belongs to exactly one client. The exceptions are classes that no client has: with
    pathological if clients x classes_per_client < n_classes, and official test samples of classes without training
    samples.

    Raises `UsageError` when this is not possible.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    pooled = split == "pooled"
    least = max(min_samples, 2 if pooled else 1)
    rows = labels if pooled else labels[:n_train]
    if clients < 1:
        raise UsageError(f"{clients} clients cannot share a dataset; give at least 1")
    if clients * least > len(rows):
        raise UsageError(
            f"{clients} clients with at least {least} samples each need {clients * least} samples, there are "
            f"{len(rows)}; ask for fewer clients or lower the minimum"
        )

    class_sizes = np.bincount(rows, minlength=n_classes)
    key = ("partition", partition, split)
    random = rng(seed, *key, "counts")
    moved = 0
    if partition == "iid":
        sizes, moved = _iid_sizes(len(rows), clients, least, random, balanced=balanced)
        owned = np.split(rng(seed, *key, "deal").permutation(len(rows)), np.cumsum(sizes)[:-1])
    else:
        if partition == "dirichlet":
            spread = _alpha(alpha)
            if balanced:
                counts = _balanced_dirichlet(class_sizes, clients, spread, random)
            else:
                counts, moved = _dirichlet(class_sizes, clients, spread, least, random)
        elif partition == "pathological":
            counts, moved = _pathological(class_sizes, clients, classes_per_client, least, random, balanced=balanced)
        else:
            raise unknown("partition", partition, PARTITIONS)
        owned = _deal(rows, counts, rng(seed, *key, "deal"))

    if pooled:
        random = rng(seed, *key, "split")
        shuffled = [random.permutation(part) for part in owned]
        cuts = [min(max(3 * len(part) // 4, 1), len(part) - 1) for part in shuffled]
        train = [part[:cut] for part, cut in zip(shuffled, cuts, strict=True)]
        test = [part[cut:] for part, cut in zip(shuffled, cuts, strict=True)]
    else:
        train = owned
        held = np.stack([np.bincount(labels[part], minlength=n_classes) for part in owned])
        test_counts = _follow(held, np.bincount(labels[n_train:], minlength=n_classes))
        test = [part + n_train for part in _deal(labels[n_train:], test_counts, rng(seed, *key, "split"))]
    return Partition(
        train=tuple(np.sort(part).astype(np.int64) for part in train),
        test=tuple(np.sort(part).astype(np.int64) for part in test),
        moved=moved,
    )


def _alpha(alpha: float | None) -> float:
    low, high = _ALPHA_RANGE
    if alpha is None or not low <= alpha <= high:
        raise UsageError(f"alpha is {alpha}; partition dirichlet needs a number from {low:g} to {high:g}")
    return alpha


def _deal(labels: Ints, counts: Ints, random: np.random.RandomState) -> list[Ints]:
    """Return each client's rows of `labels`, drawn at random such that client i has `counts[i, c]` of class c."""
    parts: list[list[Ints]] = [[] for _ in counts]
    for kind, column in enumerate(counts.T):
        shuffled = random.permutation(np.flatnonzero(labels == kind))
        ends = np.cumsum(column)
        for client in np.flatnonzero(column):
            parts[client].append(shuffled[ends[client] - column[client] : ends[client]])
    return [np.concatenate(part) for part in parts]


def _log_dirichlet(alpha: float, size: int, random: np.random.RandomState) -> Floats:
    """Return the logarithms of a symmetric Dirichlet draw, up to a constant.

    Gamma(alpha) is Gamma(alpha + 1) * U ** (1 / alpha): in logarithms this stays finite where, for small alpha, the
    draws themselves would all underflow to 0 and their quotient would be NaN.
    """
    uniform = 1.0 - random.random_sample(size)
    logs: Floats = np.log(random.standard_gamma(alpha + 1.0, size)) + np.log(uniform) / alpha
    return logs


def _normalised(logs: Floats, allowed: npt.NDArray[np.bool_]) -> Floats:
    """Return the probabilities with these logarithms, given that only the `allowed` can occur."""
    masses: Floats = np.exp(np.where(allowed, logs - logs[allowed].max(), -np.inf))
    masses /= masses.sum()
    return masses


def _dirichlet(
    class_sizes: Ints, clients: int, alpha: float, least: int, random: np.random.RandomState
) -> tuple[Ints, int]:
    """Split each class by a separate Dirichlet draw over the clients, as PFLlib and NIID-Bench do.

    A client that already has its fair share gets no more samples. The published code draws again until every client has
    `least` samples, which never ends for small alpha; here the best of `_DRAWS` draws is repaired.
    """
    best = np.zeros((clients, len(class_sizes)), dtype=np.int64)
    for _ in range(_DRAWS):
        counts = np.zeros_like(best)
        for kind in np.flatnonzero(class_sizes):
            logs = _log_dirichlet(alpha, clients, random)
            hungry = counts.sum(axis=1) * clients < class_sizes.sum()
            # Rounded, not truncated: a sum of 0.999... would otherwise give the last client a sample of each class.
            cuts = np.rint(np.cumsum(_normalised(logs, hungry))[:-1] * class_sizes[kind]).astype(np.int64)
            counts[:, kind] = np.diff(cuts, prepend=0, append=class_sizes[kind])
        if not best.any() or counts.sum(axis=1).min() > best.sum(axis=1).min():
            best = counts
        if best.sum(axis=1).min() >= least:
            break
    return _repair(best, least)


def _repair(counts: Ints, least: int) -> tuple[Ints, int]:
    """Return `counts` with at least `least` samples in each row, and the number of samples that were moved.

    A client that lacks samples takes them from the largest client's largest class, in one piece if that class has
    enough. So a repaired client is as skewed as a drawn one.
    """
    counts = counts.copy()
    missing = np.maximum(least - counts.sum(axis=1), 0)
    for client in np.flatnonzero(missing):
        wanted = int(missing[client])
        while wanted:
            sizes = counts.sum(axis=1)
            donor = sizes.argmax()
            kind = counts[donor].argmax()
            # The donor keeps the minimum: another client lacks samples, so the largest client has more than that.
            piece = min(wanted, counts[donor, kind], sizes[donor] - least)
            counts[donor, kind] -= piece
            counts[client, kind] += piece
            wanted -= piece
    return counts, int(missing.sum())


def _balanced_dirichlet(class_sizes: Ints, clients: int, alpha: float, random: np.random.RandomState) -> Ints:
    """Draw for each client, all of equal size, a class mix from Dirichlet(alpha) over the classes.

    The client-wise variant of FedDyn (Acar et al., 2021) and FedLab. Clients draw in random order; when a class runs
    out, the mix continues among the others, so the last clients get the remaining samples. Each pass fills the client
    or empties a class: there are at most as many passes as classes.
    """
    left = class_sizes.copy()
    counts = np.zeros((clients, len(class_sizes)), dtype=np.int64)
    sizes = _equal(int(class_sizes.sum()), clients, random)
    for client in random.permutation(clients):
        logs = _log_dirichlet(alpha, len(class_sizes), random)
        while wanted := int(sizes[client] - counts[client].sum()):
            take = np.minimum(random.multinomial(wanted, _normalised(logs, left > 0)), left)
            counts[client] += take
            left -= take
    return counts


def _equal(total: int, parts: int, random: np.random.RandomState) -> Ints:
    """Return `parts` sizes that differ by at most one and sum to `total`; the larger ones are drawn at random."""
    sizes: Ints = total // parts + (random.permutation(parts) < total % parts).astype(np.int64)
    return sizes


def _log_normal(total: int, parts: int, random: np.random.RandomState) -> Ints:
    """Return `parts` sizes in proportion to log-normal draws (sigma 0.5) that sum to `total`."""
    return _proportional(np.exp(_SIGMA * random.standard_normal(parts)), total)


def _proportional(weights: Floats | Ints, total: int) -> Ints:
    """Return integers in proportion to `weights` that sum to `total`: the largest remainders are rounded up."""
    exact = weights * (total / weights.sum())
    shares: Ints = np.floor(exact).astype(np.int64)
    rounded_up = np.argsort(shares - exact, kind="stable")[: total - shares.sum()]
    shares[rounded_up] += 1
    return shares


def _iid_sizes(
    total: int, clients: int, least: int, random: np.random.RandomState, *, balanced: bool
) -> tuple[Ints, int]:
    """Return each client's number of samples: equal, or log-normal as in FedLab (Zeng et al., 2023)."""
    if balanced:
        return _equal(total, clients, random), 0
    sizes, moved = _repair(_log_normal(total, clients, random)[:, np.newaxis], least)
    return sizes[:, 0], moved


def _pathological(
    class_sizes: Ints,
    clients: int,
    per_client: int | None,
    least: int,
    random: np.random.RandomState,
    *,
    balanced: bool,
) -> tuple[Ints, int]:
    """Give each client `per_client` classes, and split each class among its holders (McMahan et al., 2017)."""
    present = np.flatnonzero(class_sizes)
    if per_client is None or not 1 <= per_client <= len(present):
        raise UsageError(
            f"classes per client is {per_client}; partition pathological needs a number from 1 to {len(present)}, "
            "the number of classes in the data"
        )
    holds = np.zeros((clients, len(class_sizes)), dtype=bool)
    for client in range(clients):
        # The classes with the fewest holders first, in random order among equals: so holders are spread evenly.
        order = np.lexsort((random.permutation(len(present)), holds[:, present].sum(axis=0)))
        holds[client, present[order[:per_client]]] = True
    floor = -(-least // per_client)
    counts = np.zeros((clients, len(class_sizes)), dtype=np.int64)
    moved = 0
    for kind in np.flatnonzero(holds.any(axis=0)):
        holders = np.flatnonzero(holds[:, kind])
        size = int(class_sizes[kind])
        if size < floor * len(holders):
            raise UsageError(
                f"class {kind} has {size} samples for {len(holders)} clients that need {floor} each; ask for fewer "
                "clients, fewer classes per client or a lower minimum"
            )
        shares = _equal(size, len(holders), random) if balanced else _log_normal(size, len(holders), random)
        repaired, more = _repair(shares[:, np.newaxis], floor)
        counts[holders, kind] = repaired[:, 0]
        moved += more
    return counts, moved


def _follow(held: Ints, class_sizes: Ints) -> Ints:
    """Return int64 [clients, classes]: the test samples for clients that hold the training samples `held`.

    Each class is split in proportion to `held`. A client without test samples gets one, of its most frequent class in
    which another client can spare one.
    """
    counts = np.zeros_like(held)
    for kind in np.flatnonzero(held.any(axis=0)):
        counts[:, kind] = _proportional(held[:, kind], int(class_sizes[kind]))
    for client in np.flatnonzero(counts.sum(axis=1) == 0):
        for kind in np.argsort(-held[client], kind="stable"):
            spare = np.where(counts[:, kind] > 0, counts.sum(axis=1), 0)
            donor = spare.argmax()
            if held[client, kind] and spare[donor] > 1:
                counts[donor, kind] -= 1
                counts[client, kind] += 1
                break
        else:
            raise UsageError(
                f"the official test set is too small to give each of {len(held)} clients a sample of its classes; ask "
                "for fewer clients or --split pooled"
            )
    return counts
