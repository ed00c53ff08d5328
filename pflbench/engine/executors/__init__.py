"""Executors: they compute the clients' jobs in this process or in workers, with the same bits as results."""

from pflbench.engine.cores import cores
from pflbench.engine.execution import PER_GPU, Execution
from pflbench.engine.executors.base import Executor
from pflbench.engine.executors.processes import Processes
from pflbench.engine.executors.serial import Serial
from pflbench.engine.experiment import Experiment
from pflbench.store.memory import Notice


def make(experiment: Experiment, execution: Execution, notice: Notice) -> Executor:
    """Return the executor that computes `experiment`. Raises `UsageError` when there is no such device."""
    if execution.executor == "ray":
        from pflbench.engine.executors.ray import Ray

        return Ray(experiment, execution, notice)
    devices = execution.devices()
    if execution.executor == "serial":
        return Serial(devices)
    wanted = execution.workers or (cores() if devices.type == "cpu" else PER_GPU * devices.count)
    return Processes(min(wanted, experiment.spec.clients), devices, notice)
