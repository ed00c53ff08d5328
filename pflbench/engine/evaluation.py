"""Evaluation: the score of one client, and the summary over all clients."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pflbench.core.device import Replica, chunks, numbers
from pflbench.core.params import State
from pflbench.errors import Diverged, MethodError
from pflbench.federation import Split

Predict = Callable[[Replica, State, Tensor], Tensor]
"""`Algorithm.predict` of a method."""


@dataclasses.dataclass(frozen=True)
class Score:
    """One client's evaluation.

    The client has `n` test samples. The deployed model classifies `correct` of them correctly; `loss` is the sum of its
    cross-entropies. The global model classifies `global_correct` correctly, None without a global model; the client's
    own model `own_correct`, None if it is not tested. `models` has the fingerprints of the three models: a model that
    did not change since the last evaluation is not evaluated again.
    """

    client: int
    n: int
    correct: int
    loss: float
    global_correct: int | None
    own_correct: int | None
    models: tuple[str, str | None, str | None]


def accuracies(score: Score) -> dict[str, int | float | None]:
    """Return a client's line for clients.parquet (without the round)."""
    of_global = None if score.global_correct is None else score.global_correct / score.n
    line = {"client": score.client, "n": score.n, "accuracy": score.correct / score.n, "global_accuracy": of_global}
    return line if score.own_correct is None else {**line, "own_accuracy": score.own_correct / score.n}


def test(predict: Predict, replica: Replica, deployed: State, split: Split) -> tuple[int, float]:
    """Return how many samples of `split` `predict` classifies correctly, and the sum of the cross-entropies.

    The sum is inf if the method rules out (logit -inf) a class that occurs, and NaN if other logits are not finite.
    """
    highest = int(split.y.max()) if len(split) else 0
    correct: list[Tensor] = []
    losses: list[Tensor] = []
    finite: list[Tensor] = []
    split = replica.device.to(split)
    with torch.no_grad():
        for rows in chunks(len(split)):
            with replica.forward():
                logits, y = predict(replica, deployed, replica.batch(split.x, rows)), split.y[rows]
                if logits.dim() != 2 or len(logits) != len(y) or logits.shape[1] <= highest:
                    shape = tuple(logits.shape)
                    raise MethodError(f"predict returned the shape {shape}; logits are [{len(y)}, classes]")
                correct.append((logits.argmax(1) == y).sum())
                losses.append(F.cross_entropy(logits, y, reduction="sum"))
                finite.append((logits.isfinite() | (logits == -math.inf)).all())
    loss = float(sum(numbers(losses)))
    return sum(numbers(correct)), loss if all(numbers(finite)) else math.nan


def summary(scores: Sequence[Score]) -> dict[str, float | None]:
    """Return the accuracies over clients, as fractions.

    `accuracy` is weighted by test samples, `accuracy_mean` is not; `accuracy_std` is the population standard deviation
    over clients; `accuracy_worst10` is the plain mean of the worst 10 % of the clients (at least one). If the clients'
    own models are tested, these four metrics of theirs have the same names after `own_`. `global_accuracy` is
    weighted, and None without a global model. `test_loss` is weighted, and None if a method rules out a class that
    occurs. Raises `Diverged` when a loss is not a number.
    """
    for score in scores:
        if math.isnan(score.loss):
            raise Diverged(f"client {score.client}: the loss on the test data is {score.loss}; lower lr")
    sizes = [s.n for s in scores]
    of_global = [s.global_correct for s in scores if s.global_correct is not None]
    own = [s.own_correct for s in scores if s.own_correct is not None]
    loss = sum(s.loss for s in scores) / sum(sizes)
    return {
        **_over_clients([s.correct for s in scores], sizes),
        "global_accuracy": sum(of_global) / sum(sizes) if of_global else None,
        "test_loss": loss if math.isfinite(loss) else None,
        **({f"own_{name}": value for name, value in _over_clients(own, sizes).items()} if own else {}),
    }


def _over_clients(correct: Sequence[int], sizes: Sequence[int]) -> dict[str, float]:
    each = np.sort([k / n for k, n in zip(correct, sizes, strict=True)])
    return {
        "accuracy": sum(correct) / sum(sizes),
        "accuracy_mean": float(each.mean()),
        "accuracy_std": float(each.std()),
        "accuracy_worst10": float(each[: math.ceil(len(each) / 10)].mean()),
    }
