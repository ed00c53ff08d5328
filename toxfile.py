"""Smoke environments of tox: `smoke-<method>-alpha<digits>` for every method, such as `smoke-per-fedavg-alpha001`."""

from collections.abc import Iterable
from pathlib import Path

from tox.config.loader.memory import MemoryLoader
from tox.config.sets import ConfigSet
from tox.plugin import impl
from tox.session.state import State

ALPHAS = ("001", "01", "05", "1", "5")


@impl
def tox_extend_envs() -> Iterable[str]:
    """Return the names of the smoke environments."""
    methods = sorted(file.stem.replace("_", "-") for file in (Path(__file__).parent / "algorithms").glob("[!_]*.py"))
    return [f"smoke-{method}-alpha{alpha}" for method in methods for alpha in ALPHAS]


@impl
def tox_add_core_config(core_conf: ConfigSet, state: State) -> None:  # noqa: ARG001
    """Give each smoke environment the section `[smoke]` of tox.ini."""
    for name in tox_extend_envs():
        state.conf.memory_seed_loaders[name].append(MemoryLoader(base=["smoke", "testenv"]))
