"""How a run is computed: the executor, its workers, and their device."""

import dataclasses
import importlib.util
import os
import re
import signal
from multiprocessing.connection import Connection

from pflbench.core.device import TYPES, Devices, in_use
from pflbench.engine.children import begin_child, end_children, signals_deferred, start_child
from pflbench.errors import UsageError, at_least_one, unknown

EXECUTORS = ("processes", "serial", "ray")
PER_GPU = 4
"""Workers that share a GPU: the training of one client alone does not fill it."""
_HOST_PORT = re.compile(r"([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:]+\]):\d{1,5}")


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a run is computed. It is not part of the run's spec or id.

    `executor` is "processes" (on this machine), "serial" (in this process) or "ray" (on the nodes of a Ray cluster).
    `workers` is the number of workers; by default one per core, or four per GPU. `device` is the type of device on
    which the workers compute: "cpu", "cuda" or "mps". `ray_address` is HOST:PORT of a running Ray cluster; with None,
    the executor "ray" starts Ray on this machine, and ends it with the run.
    """

    executor: str = "processes"
    workers: int | None = None
    device: str = "cpu"
    ray_address: str | None = None

    def check(self) -> None:
        """Raise `UsageError` for an unknown executor or device, an impossible number or address, or without Ray."""
        if self.executor not in EXECUTORS:
            raise unknown("executor", self.executor, EXECUTORS)
        if self.workers is not None:
            at_least_one("workers", self.workers)
        if self.device not in TYPES:
            kind, colon, _ = self.device.partition(":")
            if colon and kind in TYPES:
                raise UsageError(f"device: give {kind!r}, not {self.device!r}; CUDA_VISIBLE_DEVICES chooses among GPUs")
            raise unknown("device", self.device, TYPES)
        if self.executor == "ray":
            self._check_ray()
        elif self.ray_address is not None:
            raise UsageError("ray_address: only the executor ray uses it; add --executor ray")

    def _check_ray(self) -> None:
        if self.device == "mps":
            raise UsageError("device: the executor ray computes on cpu or cuda, not on mps")
        if importlib.util.find_spec("ray") is None:
            raise UsageError("executor: ray needs Ray; pip install 'pflbench[ray]'")
        address, set_address = self.ray_address, os.environ.get("RAY_ADDRESS")
        if address is not None and not _HOST_PORT.fullmatch(address):
            raise UsageError(f"ray_address: {address!r} is not HOST:PORT, such as 10.0.0.1:6379")
        if set_address and set_address != address:
            given = "no --ray-address" if address is None else f"--ray-address {address}"
            raise UsageError(
                f"ray_address: there is {given}, but the environment has RAY_ADDRESS={set_address}; "
                "give that address, or unset RAY_ADDRESS"
            )

    def devices(self) -> Devices:
        """Return the devices of this machine. Raises `UsageError` if there are none of this type.

        Another process looks for them: a process that has used CUDA cannot fork workers that use it.
        """
        if self.device == "cpu":
            return Devices()
        if in_use() == self.device:
            if self.executor == "serial":
                return TYPES[self.device]()
            raise UsageError(
                f"device: this process has used {self.device} already, so its workers could not; "
                "run before you use it, or with executor='serial'"
            )
        with signals_deferred():
            connection, process = start_child(_find, self.device, duplex=False, daemon=True)
        try:
            found = connection.recv()
        except EOFError:
            process.join()
            found = UsageError(f"device: {self.device} cannot be used: torch ended with exit code {process.exitcode}")
        finally:
            end_children([(connection, process)])
        if isinstance(found, UsageError):
            raise found
        devices: Devices = found
        return devices

    def use_only(self, number: int) -> None:
        """Let this process, which has not used the device yet, see only the device of this number."""
        if self.device == "cuda":
            seen = os.environ.get("CUDA_VISIBLE_DEVICES")
            os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[number] if seen else str(number)


DEFAULT = Execution()


def _find(device: str, to: Connection) -> None:
    """Look for devices in this child process, and send them or the error."""
    begin_child(signal.SIG_DFL)
    try:
        to.send(TYPES[device]())
    except UsageError as error:
        to.send(error)
    except Exception as error:
        to.send(UsageError(f"device: {device} cannot be used: {' '.join(str(error).split())}"))
