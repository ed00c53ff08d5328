"""The contract of methods: algorithms, clients, parameters, training.

A method's file imports everything that it needs from this package:

    from pflbench.core import Client, Message, State, register, setting

Names are imported when they are first used: `pflbench list` reads methods without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pflbench.core.algorithm import (
        Algorithm,
        Cohort,
        Message,
        Round,
        Setup,
        Upload,
        mean,
        merged_prototypes,
        need_features,
    )  # fmt: skip
    from pflbench.core.client import Client, class_counts, class_means, prototypes
    from pflbench.core.device import Replica, numbers
    from pflbench.core.models import Net
    from pflbench.core.params import Params, State, average, body, distance, head, linear_head, zeros_like
    from pflbench.core.registry import register
    from pflbench.core.training import SGD, Batch, Loss, Transform, cross_entropy, proximal
    from pflbench.errors import Diverged, UsageError
    from pflbench.settings import setting

_HOME = {
    "pflbench.core.algorithm": (
        "Algorithm", "Cohort", "Message", "Round", "Setup", "Upload", "mean", "merged_prototypes", "need_features",
    ),
    "pflbench.core.client": ("Client", "class_counts", "class_means", "prototypes"),
    "pflbench.core.device": ("Replica", "numbers"),
    "pflbench.core.models": ("Net",),
    "pflbench.core.params": ("Params", "State", "average", "body", "distance", "head", "linear_head", "zeros_like"),
    "pflbench.core.registry": ("register",),
    "pflbench.core.training": ("SGD", "Batch", "Loss", "Transform", "cross_entropy", "proximal"),
    "pflbench.errors": ("Diverged", "UsageError"),
    "pflbench.settings": ("setting",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022
    "Algorithm", "Cohort", "Message", "Round", "Setup", "Upload", "mean", "merged_prototypes", "need_features",
    "Client", "class_counts", "class_means", "prototypes", "Replica", "numbers", "Net", "Params", "State",
    "average", "body", "distance", "head", "linear_head", "zeros_like", "register", "SGD", "Batch", "Loss", "Transform",
    "cross_entropy", "proximal", "Diverged", "UsageError", "setting",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'pflbench.core' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
