"""pflbench: personalised federated learning, benchmarked.

    import pflbench
    record = pflbench.run(pflbench.RunSpec(algo="fedper", rounds=5))
    record.summary["last"]["accuracy"]

Names are imported when they are first used, so that the command line starts without torch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout, the folders that an installation maps into this package are next to it.
if not (Path(__file__).parent / "algorithms").exists():
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from pflbench.core.algorithm import Algorithm, Message, Round, Setup, Upload
    from pflbench.core.client import Client
    from pflbench.core.models import Net, build_model
    from pflbench.core.registry import register
    from pflbench.engine.execution import Execution
    from pflbench.engine.experiment import Experiment, load_federation, prepare
    from pflbench.engine.observers import Observer
    from pflbench.engine.runner import run, run_experiment
    from pflbench.errors import Diverged, MethodError, PflbenchError, RunError, UsageError
    from pflbench.federation import ClientData, Federation, Split
    from pflbench.participation import participants
    from pflbench.settings import setting
    from pflbench.spec import RunSpec
    from pflbench.store.folder import Folder
    from pflbench.store.memory import Memory
    from pflbench.store.record import Record

_HOME = {
    "core.algorithm": ("Algorithm", "Message", "Round", "Setup", "Upload"),
    "core.client": ("Client",),
    "core.models": ("Net", "build_model"),
    "core.registry": ("register",),
    "engine.execution": ("Execution",),
    "engine.experiment": ("Experiment", "load_federation", "prepare"),
    "engine.observers": ("Observer",),
    "engine.runner": ("run", "run_experiment"),
    "errors": ("Diverged", "MethodError", "PflbenchError", "RunError", "UsageError"),
    "federation": ("ClientData", "Federation", "Split"),
    "participation": ("participants",),
    "settings": ("setting",),
    "spec": ("RunSpec",),
    "store.folder": ("Folder",),
    "store.memory": ("Memory",),
    "store.record": ("Record",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022
    "Algorithm", "Message", "Round", "Setup", "Upload", "Client", "Net", "build_model", "register", "Execution",
    "Experiment", "load_federation", "prepare", "Observer", "run", "run_experiment", "Diverged", "MethodError",
    "PflbenchError", "RunError", "UsageError", "ClientData", "Federation", "Split", "participants", "setting",
    "RunSpec", "Folder", "Memory", "Record",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'pflbench' has no attribute {name!r}")
    return getattr(import_module(f"pflbench.{_MODULE_OF[name]}"), name)
