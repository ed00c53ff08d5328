"""pflbench: personalised federated learning, benchmarked.

    import pflbench
    record = pflbench.run(pflbench.RunSpec(algo="fedper", rounds=5))
    record.summary["last"]["accuracy"]

Names are imported when they are first used, so that the command line starts without torch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout the folders that an installation maps into this package stand beside it.
if not (Path(__file__).parent / "algorithms").exists():
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from pflbench.core.algorithm import Algorithm, Message
    from pflbench.core.client import Local
    from pflbench.core.models import Net, build_model
    from pflbench.core.registry import register
    from pflbench.engine.engine import load_federation, participants, resolve, run
    from pflbench.errors import Diverged, PflbenchError, RunError, UsageError
    from pflbench.federation import ClientData, Federation, Split
    from pflbench.settings import setting
    from pflbench.spec import RunSpec
    from pflbench.store.record import Record

_HOME = {
    "core.algorithm": ("Algorithm", "Message"),
    "core.client": ("Local",),
    "core.models": ("Net", "build_model"),
    "core.registry": ("register",),
    "engine.engine": ("load_federation", "participants", "resolve", "run"),
    "errors": ("Diverged", "PflbenchError", "RunError", "UsageError"),
    "federation": ("ClientData", "Federation", "Split"),
    "settings": ("setting",),
    "spec": ("RunSpec",),
    "store.record": ("Record",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022
    "Algorithm", "Message", "load_federation", "participants", "resolve", "run", "Diverged", "PflbenchError",
    "RunError", "UsageError", "ClientData", "Federation", "Split", "Local", "Net", "build_model", "setting", "Record",
    "register", "RunSpec",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'pflbench' has no attribute {name!r}")
    return getattr(import_module(f"pflbench.{_MODULE_OF[name]}"), name)
