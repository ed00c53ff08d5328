"""pflbench: personalised federated learning, benchmarked.

    import pflbench
    record = pflbench.run(pflbench.RunSpec(algo="fedper", rounds=5))
    record.summary["last"]["accuracy"]

Names are imported when they are first used, so that the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pflbench.algorithm import Algorithm, Message
    from pflbench.engine import load_federation, participants, resolve, run
    from pflbench.errors import Diverged, PflbenchError, RunError, UsageError
    from pflbench.federation import ClientData, Federation, Split
    from pflbench.local import Local
    from pflbench.models import Net, build_model
    from pflbench.options import option
    from pflbench.record import Record
    from pflbench.registry import register
    from pflbench.spec import RunSpec

_HOME = {
    "algorithm": ("Algorithm", "Message"),
    "engine": ("load_federation", "participants", "resolve", "run"),
    "errors": ("Diverged", "PflbenchError", "RunError", "UsageError"),
    "federation": ("ClientData", "Federation", "Split"),
    "local": ("Local",),
    "models": ("Net", "build_model"),
    "options": ("option",),
    "record": ("Record",),
    "registry": ("register",),
    "spec": ("RunSpec",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022
    "Algorithm", "Message", "load_federation", "participants", "resolve", "run", "Diverged", "PflbenchError",
    "RunError", "UsageError", "ClientData", "Federation", "Split", "Local", "Net", "build_model", "option", "Record",
    "register", "RunSpec",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'pflbench' has no attribute {name!r}")
    return getattr(import_module(f"pflbench.{_MODULE_OF[name]}"), name)
