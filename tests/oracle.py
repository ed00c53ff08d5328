"""The toy's network and its training in plain torch: what tests compare pflbench with. It imports nothing of pflbench.

A model is a dict of name to tensor; `BODY` and `HEAD` are the names of its two parts. A client's arrays are
`(x, y, x_test, y_test)`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Params = dict[str, Tensor]
Arrays = tuple[Tensor, Tensor, Tensor, Tensor]
BODY = ("body.0.weight", "body.0.bias")
HEAD = ("head.weight", "head.bias")


# The clients' samples.


def arrays(sizes: Iterable[int] = (7, 4), *, seed: int = 0, tests: int = 60) -> list[Arrays]:
    """Return clients of these sizes; clients 1, 3, ... have no samples of class 2."""
    random = np.random.RandomState(seed)
    clients = []
    for i, n in enumerate(sizes):
        labels = np.arange(n + tests) % (3 if i % 2 == 0 else 2)
        samples = random.randn(n + tests, 3) + 0.8 * labels[:, None] * np.array([1.0, -1.0, 0.5]) * (1 if i % 2 else -1)
        x, y = torch.from_numpy(samples), torch.from_numpy(labels)
        clients.append((x[:n], y[:n], x[n:], y[n:]))
    return clients


def batches(n: int, size: int) -> list[list[int]]:
    """Return the batches of one epoch in stored order; the last batch may be incomplete."""
    return [list(range(i, min(i + size, n))) for i in range(0, n, size)]


# The network.


def features(p: Params, x: Tensor) -> Tensor:
    """Return what the body gives."""
    return torch.tanh(x @ p["body.0.weight"].T + p["body.0.bias"])


def logits(p: Params, x: Tensor) -> Tensor:
    """Return what the whole network gives."""
    return features(p, x) @ p["head.weight"].T + p["head.bias"]


def nll(p: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean negative log-likelihood."""
    z = logits(p, x)
    return (torch.logsumexp(z, 1) - z[torch.arange(len(y)), y]).mean()


# Training.


def gradient(loss: Callable[[Params], Tensor], p: Params, names: Iterable[str]) -> Params:
    """Return the gradient of `loss` at `p` with respect to the parameters in `names`."""
    q = {name: t.clone().requires_grad_(name in names) for name, t in p.items()}
    chosen = [name for name in q if name in names]
    return dict(zip(chosen, torch.autograd.grad(loss(q), [q[n] for n in chosen]), strict=True))


def descend(
    p: Params,
    batches: Iterable[list[int]],
    loss: Callable[[Params, list[int]], Tensor],
    *,
    lr: float,
    names: Iterable[str] = BODY + HEAD,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> Params:
    """Return `p` after SGD: v <- momentum v + (g + weight_decay w), w <- w - lr v, from v = 0."""
    v: dict[str, Any] = dict.fromkeys(names, 0.0)
    for batch in batches:
        g = gradient(lambda q, b=batch: loss(q, b), p, names)
        v = {k: momentum * v[k] + g[k] + weight_decay * p[k] for k in names}
        p = {k: p[k] - lr * v[k] if k in names else p[k] for k in p}
    return p


def train(p: Params, x: Tensor, y: Tensor, epochs: int, size: int = 3, **kw: Any) -> Params:
    """Return `p` after `epochs` of SGD on the negative log-likelihood in stored order."""
    return descend(p, batches(len(y), size) * epochs, lambda q, b: nll(q, x[b], y[b]), **kw)


# Models.


def mean(parts: list[Params], weights: list[float]) -> Params:
    """Return the weighted mean of models."""
    total = sum(weights)
    return {k: sum(w / total * p[k] for p, w in zip(parts, weights, strict=True)) for k in parts[0]}


def body(p: Params) -> Params:
    """Return the parameters of the body."""
    return {k: t for k, t in p.items() if k in BODY}


def head(p: Params) -> Params:
    """Return the parameters of the head."""
    return {k: t for k, t in p.items() if k in HEAD}


def close(actual: Params, expected: Params) -> None:
    """Assert that two models have the same names and differ by 1e-9 at most."""
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-9)


def same(a: Params, b: Params) -> bool:
    """Return whether two models have the same names and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
