import time

import numpy as np
import pytest
from refusals import refusal

from pflbench.datasets import partitioners as P
from pflbench.errors import UsageError

BASE = {
    "partition": "dirichlet",
    "clients": 20,
    "alpha": 0.1,
    "classes_per_client": 2,
    "balanced": False,
    "min_samples": 8,
    "split": "pooled",
    "seed": 0,
}
KINDS = [(name, balanced) for name in P.PARTITIONS for balanced in (False, True)]


def labels_of(n, classes, seed=0):
    return np.random.RandomState(seed).permutation(np.arange(n) % classes)


LABELS = labels_of(6000, 10)
PINNED = [
    ("dirichlet", False, "pooled", "cffe10d6da167e54"),
    ("dirichlet", False, "official", "b0e4ae87f00b588b"),
    ("dirichlet", True, "pooled", "6146e64df3246d3d"),
    ("dirichlet", True, "official", "9d3663c039951f0e"),
    ("iid", False, "pooled", "a44a69c7f29af353"),
    ("iid", False, "official", "0bead941e46dc270"),
    ("iid", True, "pooled", "1bb81385a05fe33f"),
    ("iid", True, "official", "d3a39915d8860460"),
    ("pathological", False, "pooled", "d44bf84eec18ca4b"),
    ("pathological", False, "official", "72ba116a9eaf4ee2"),
    ("pathological", True, "pooled", "53112fb4b3c67a60"),
    ("pathological", True, "official", "8ef3e3ab4926d61f"),
]


def make(labels=LABELS, n_train=5000, n_classes=10, **changes):
    return P.make(labels, n_train, n_classes, **{**BASE, **changes})


@pytest.mark.parametrize("split", P.SPLITS)
@pytest.mark.parametrize(("name", "balanced"), KINDS)
def test_every_sample_has_exactly_one_owner(name, balanced, split):
    made = make(partition=name, balanced=balanced, split=split)
    owned = np.concatenate(made.train + made.test)
    assert np.array_equal(np.sort(owned), np.arange(6000))
    for part in made.train + made.test:
        assert part.dtype == np.int64
        assert np.all(np.diff(part) > 0)
        assert len(part) >= 1
    if split == "official":
        assert max(part.max() for part in made.train) < 5000 <= min(part.min() for part in made.test)


@pytest.mark.parametrize(("name", "balanced"), KINDS)
def test_same_seed_same_partition_other_seed_another(name, balanced):
    first, again, other = (make(partition=name, balanced=balanced, seed=seed).fingerprint for seed in (5, 5, 6))
    assert first == again != other


def test_fingerprint_sees_who_has_what():
    made = make()
    swapped = P.Partition(train=made.train[::-1], test=made.test[::-1], moved=made.moved)
    crossed = P.Partition(train=made.test, test=made.train, moved=made.moved)
    assert len({made.fingerprint, swapped.fingerprint, crossed.fingerprint}) == 3


@pytest.mark.parametrize(("name", "balanced", "split", "pinned"), PINNED)
def test_partitions_never_change_between_releases(name, balanced, split, pinned):
    assert make(partition=name, balanced=balanced, split=split).fingerprint[:16] == pinned


@pytest.mark.parametrize("split", P.SPLITS)
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("alpha", [0.01, 1e-4, 1e-6])
def test_tiny_alpha_with_500_clients_ends_soon_and_keeps_the_minimum(alpha, balanced, split):
    labels = labels_of(60000, 10)
    begun = time.perf_counter()
    made = make(labels, 50000, alpha=alpha, balanced=balanced, split=split, clients=500, min_samples=20)
    assert time.perf_counter() - begun < 10
    if split == "pooled":
        sizes = [len(train) + len(test) for train, test in zip(made.train, made.test, strict=True)]
    else:
        sizes = [len(train) for train in made.train]
    assert min(sizes) >= 20
    counts = made.counts(labels, 10)
    # Mending the small clients does not mix them: nearly all have one or two classes.
    assert np.median((counts > 0).sum(axis=1)) <= 2


def test_draws_for_too_small_clients_have_an_end(monkeypatch):
    draws, draw = [], P._log_dirichlet

    def counted(*args):
        draws.append(args)
        assert len(draws) <= 10 * P._DRAWS
        return draw(*args)

    monkeypatch.setattr(P, "_log_dirichlet", counted)
    make(labels_of(60000, 10), 50000, alpha=0.01, clients=500, min_samples=20)
    assert len(draws) == 10 * P._DRAWS


def test_moved_counts_what_repair_moved():
    drawn = make(labels_of(60000, 10), 50000, clients=500, alpha=0.01, min_samples=2)
    mended = make(labels_of(60000, 10), 50000, clients=500, alpha=0.01, min_samples=60)
    assert 0 < drawn.moved < mended.moved
    assert make(alpha=100.0).moved == 0


def test_repair_takes_from_the_largest_class_of_the_largest_client():
    counts, moved = P._repair(np.array([[0, 1], [30, 10], [5, 9]]), 6)
    assert counts.tolist() == [[5, 1], [25, 10], [5, 9]]
    assert moved == 5


def test_a_client_at_its_fair_share_gets_no_more_classes():
    # With tiny alpha a class goes to one client whole; the cap then shuts that client out, so nobody has two.
    counts = make(alpha=1e-6, clients=10, min_samples=2).counts(LABELS, 10)
    assert sorted(counts.max(axis=1)) == [600] * 10


def test_the_last_client_gets_no_crumbs_of_every_class():
    labels = labels_of(20000, 100)
    counts = make(labels, 20000, 100).counts(labels, 100)
    held = (counts > 0).sum(axis=1)
    assert held[-1] < 2 * held.mean()


def test_balanced_sizes_are_equal_and_unbalanced_are_not():
    for name in ("dirichlet", "iid"):
        even = make(partition=name, balanced=True, clients=7).counts(LABELS, 10).sum(axis=1)
        assert even.max() - even.min() <= 1
        uneven = make(partition=name, balanced=False, clients=7).counts(LABELS, 10).sum(axis=1)
        assert uneven.max() > 1.3 * uneven.min()


def test_alpha_rules_the_skew():
    def largest_share(alpha, balanced):
        counts = make(alpha=alpha, balanced=balanced, min_samples=2).counts(LABELS, 10)
        return (counts.max(axis=1) / counts.sum(axis=1)).mean()

    for balanced in (False, True):
        assert largest_share(100.0, balanced) < 0.2
        assert 0.4 < largest_share(0.1, balanced) < 0.95
        assert largest_share(0.001, balanced) > 0.95


def test_dirichlet_has_the_moments_of_a_dirichlet():
    # Of the first class nothing is capped yet: its shares over the clients have the moments of Dirichlet(alpha).
    alpha, clients = 0.5, 10
    shares = np.array([P._normalised(P._log_dirichlet(alpha, clients, np.random.RandomState(s)), np.ones(clients, bool))
                       for s in range(2000)])  # fmt: skip
    mean = 1 / clients
    assert np.allclose(shares.mean(axis=0), mean, atol=0.015)
    assert shares.var() == pytest.approx(mean * (1 - mean) / (alpha * clients + 1), rel=0.1)


@pytest.mark.parametrize("balanced", [False, True])
def test_iid_class_mix_passes_chi_square(balanced):
    counts = make(partition="iid", balanced=balanced, min_samples=60).counts(LABELS, 10)
    expected = counts.sum(axis=1, keepdims=True) / 10
    chi2 = ((counts - expected) ** 2 / expected).sum()
    # 19 * 9 = 171 degrees of freedom: mean 171, standard deviation 18.5.
    assert 171 - 4 * 18.5 < chi2 < 171 + 4 * 18.5


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("clients", "k"), [(20, 2), (5, 2), (4, 3), (33, 7), (1, 10)])
def test_pathological_clients_have_k_classes_and_all_classes_are_used(clients, k, balanced):
    made = make(partition="pathological", clients=clients, classes_per_client=k, balanced=balanced)
    counts = made.counts(LABELS, 10)
    assert ((counts > 0).sum(axis=1) == k).all()
    assert counts.sum() == 6000
    holders = (counts > 0).sum(axis=0)
    assert holders.max() - holders.min() <= 1
    for column in counts.T if balanced else []:
        assert np.ptp(column[column > 0]) <= 1
    if not balanced and clients == 20:
        assert max(np.ptp(column[column > 0]) for column in counts.T) > 50


def test_pathological_leaves_out_the_classes_nobody_holds():
    counts = make(partition="pathological", clients=3, classes_per_client=2).counts(LABELS, 10)
    assert sorted(counts.sum(axis=0)) == [0] * 4 + [600] * 6


def test_pooled_split_is_three_quarters_to_one_quarter():
    made = make()
    for train, test in zip(made.train, made.test, strict=True):
        assert len(train) == 3 * (len(train) + len(test)) // 4
    tiny = make(np.zeros(4, np.int64), 4, 1, partition="iid", balanced=True, clients=2, min_samples=0)
    assert [len(part) for part in tiny.train + tiny.test] == [1, 1, 1, 1]


@pytest.mark.parametrize(("name", "balanced"), KINDS)
def test_official_test_sets_follow_the_training_mix(name, balanced):
    made = make(partition=name, balanced=balanced, split="official", min_samples=40)
    rate = np.bincount(LABELS[5000:], minlength=10) / np.bincount(LABELS[:5000], minlength=10)
    for train, test in zip(made.train, made.test, strict=True):
        wanted = np.bincount(LABELS[train], minlength=10) * rate
        got = np.bincount(LABELS[test], minlength=10)
        assert np.abs(got - wanted).max() < 2
        assert not got[wanted == 0].any()


def test_official_gives_every_client_a_test_sample_of_a_class_it_has():
    # 40 test samples for 20 clients: the shares of several round to 0.
    labels = np.concatenate([labels_of(1000, 5), labels_of(40, 5)])
    made = make(labels, 1000, 5, clients=20, alpha=0.3, split="official", min_samples=3)
    held = np.stack([np.bincount(labels[part], minlength=5) for part in made.train])
    plain = np.stack([P._proportional(column, 8) for column in held.T], axis=1)
    assert (plain.sum(axis=1) == 0).any()
    for train, test in zip(made.train, made.test, strict=True):
        assert len(test) >= 1
        assert set(labels[test]) <= set(labels[train])


def test_counts_cover_train_and_test_and_absent_classes():
    made = P.Partition(train=(np.array([0, 1]), np.array([4])), test=(np.array([2]), np.array([3])), moved=0)
    assert made.counts(np.array([0, 0, 2, 2, 0]), 4).tolist() == [[2, 0, 1, 0], [1, 0, 1, 0]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clients": 0}, "0 clients"),
        ({"clients": 3001}, "6002 samples, there are 6000"),
        ({"clients": 7000, "split": "official", "min_samples": 1}, "7000 samples, there are 5000"),
        ({"clients": 100, "min_samples": 61}, "6100 samples, there are 6000"),
        ({"alpha": None}, "alpha is None"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"partition": "pathological", "classes_per_client": 11}, "classes per client is 11"),
        ({"partition": "pathological", "classes_per_client": None}, "classes per client is None"),
        ({"partition": "pathological", "clients": 600, "classes_per_client": 10, "min_samples": 10}, None),
        ({"partition": "pathological", "clients": 3, "classes_per_client": 1, "min_samples": 601}, "600 samples"),
        ({"partition": "dirichlet2"}, "did you mean 'dirichlet'"),
        ({"split": "oficial"}, "did you mean 'official'"),
    ],
)
def test_impossible_demands_are_named_in_one_line(changes, words):
    changes = {"min_samples": 0, **changes}
    if words is None:  # just possible: exactly one sample of each class for each client
        assert make(**changes).counts(LABELS, 10).max() == 1
        return
    assert words in refusal(make, **changes)


def test_official_test_set_without_the_clients_classes_is_an_error():
    labels = np.array([0] * 10 + [1] * 10 + [0] * 4)
    with pytest.raises(UsageError, match="official test set is too small"):
        make(labels, 20, 2, partition="pathological", classes_per_client=1, clients=2, split="official", min_samples=2)
