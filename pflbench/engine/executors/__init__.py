"""Executors: they compute the clients' jobs in this process or in worker processes, with the same bits as results."""

from collections.abc import Callable

from pflbench.engine.executors.base import Executor
from pflbench.engine.executors.processes import Processes
from pflbench.engine.executors.serial import Serial
from pflbench.engine.work import Work

EXECUTORS: dict[str, Callable[[Work, int], Executor]] = {"processes": Processes, "serial": Serial}
