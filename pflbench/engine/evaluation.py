"""Accuracy: of one client's model, and over all clients."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from pflbench.core.client import Bench, chunks
from pflbench.core.params import Params
from pflbench.errors import Diverged
from pflbench.federation import Split


@dataclasses.dataclass(frozen=True)
class Score:
    """One client's test.

    `n` samples, of which the personalised model gets `correct` right, with cross-entropies that sum to `loss`, and the
    global model `global_correct`, which is None where there is no global model. `models` are the fingerprints of the
    two: what has not changed since the last evaluation is not tested again. `seconds` is the worker's time.
    """

    client: int
    n: int
    correct: int
    loss: float
    global_correct: int | None
    models: tuple[str, str | None]
    seconds: float = dataclasses.field(default=0.0, compare=False)


def accuracies(score: Score) -> dict[str, int | float | None]:
    """Return a client's line for clients.parquet (without the round)."""
    whole = None if score.global_correct is None else score.global_correct / score.n
    return {"client": score.client, "n": score.n, "accuracy": score.correct / score.n, "global_accuracy": whole}


def test(bench: Bench, model: Params, split: Split) -> tuple[int, float]:
    """Return how many samples of `split` `model` gets right, and the sum of their cross-entropies."""
    net = bench.load(model).eval()
    correct, loss = 0, 0.0
    with torch.no_grad():
        for part in chunks(len(split)):
            with bench.forward():
                logits, y = net(bench.batch(split.x, part)), split.y[part]
                correct += int((logits.argmax(1) == y).sum())
                loss += float(F.cross_entropy(logits, y, reduction="sum"))
    return correct, loss


def summary(scores: Sequence[Score]) -> dict[str, float | None]:
    """Return the accuracies over clients, as fractions.

    `accuracy` is weighted by test samples, `accuracy_mean` is not; `accuracy_std` is the population's standard
    deviation over clients; `accuracy_worst10` is the plain mean of the worst 10 % of the clients (at least one).
    `global_accuracy`, weighted, is None where there is no global model. `test_loss` is weighted.
    Raises `Diverged` when a loss is not finite.
    """
    for score in scores:
        if not math.isfinite(score.loss):
            raise Diverged(f"client {score.client}: the loss on the test data is {score.loss}; lower lr")
    n = sum(s.n for s in scores)
    each = np.sort([s.correct / s.n for s in scores])
    whole = [s.global_correct for s in scores if s.global_correct is not None]
    return {
        "accuracy": sum(s.correct for s in scores) / n,
        "accuracy_mean": float(each.mean()),
        "accuracy_std": float(each.std()),
        "accuracy_worst10": float(each[: math.ceil(len(each) / 10)].mean()),
        "global_accuracy": sum(whole) / n if whole else None,
        "test_loss": sum(s.loss for s in scores) / n,
    }
