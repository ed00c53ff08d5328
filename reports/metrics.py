"""The metrics of a report: those of the records, and the one that mixes deployed and own models."""

import math

import numpy as np
import pandas as pd

from pflbench.store import schema

MIXED = {
    "mixed_accuracy": "accuracy of the own models of the round's participants and the deployed models of the other "
    "clients, weighted by test samples",
    "mixed_accuracy_worst10": "accuracy of the worst 10 % of the clients, with own models of the round's participants "
    "and deployed models of the others",
}
"""What PFLlib and the code of FedAS measure: they test before the server sends its new model. No record has it."""
METRICS = {**schema.METRICS, **MIXED}
"""All metrics, and what each name means."""


def tested(metric: str) -> str:
    """Return the accuracy of the models that `metric` is about, whose best round on test is the metric's."""
    return next((name for name in ("own_accuracy", "mixed_accuracy") if metric.startswith(name)), "accuracy")


def with_mixed(
    rounds: pd.DataFrame, evaluations: pd.DataFrame, clients: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return `evaluations` and `clients` with the metrics of `MIXED`, NaN where the own models were not tested."""
    if clients["own_accuracy"].isna().all():
        return evaluations.assign(**dict.fromkeys(MIXED, math.nan)), clients.assign(mixed_accuracy=math.nan)
    took_part = rounds[["run", "round", "participants"]].explode("participants")
    pairs = pd.MultiIndex.from_frame(took_part)
    part = pd.MultiIndex.from_frame(clients[["run", "round", "client"]]).isin(pairs)
    own = clients["own_accuracy"]
    mixed = np.where(part, own, clients["accuracy"].where(own.notna()))
    clients = clients.assign(mixed_accuracy=mixed)
    of = clients.assign(right=mixed * clients["n"]).groupby(["run", "round"])
    each = of["mixed_accuracy"].agg(lambda values: np.sort(values)[: math.ceil(len(values) / 10)].mean())
    sums = of[["right", "n"]].sum(min_count=1)
    found = pd.DataFrame({"mixed_accuracy": sums["right"] / sums["n"], "mixed_accuracy_worst10": each})
    return evaluations.join(found, on=["run", "round"]), clients
