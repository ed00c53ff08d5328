"""Ray: how to connect to a cluster, and its actors. Only this module imports Ray; others get it from here."""

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Ray reads these when it is imported: it would send statistics of its use, and show a cluster no token.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if (Path.home() / ".ray" / "auth_token").exists():
    os.environ.setdefault("RAY_AUTH_MODE", "token")

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from pflbench.engine.cores import cores
from pflbench.engine.execution import PER_GPU, Execution
from pflbench.errors import UsageError

__all__ = [
    "GetTimeoutError",
    "RayError",
    "RayTaskError",
    "actor",
    "cloudpickle",
    "connected",
    "first_line",
    "ray",
    "room",
]
_ANSWER = 10.0  # seconds in which the address must answer
# What a client of gRPC, which Ray uses, says first: HTTP/2's preface, and an empty frame SETTINGS.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@contextlib.contextmanager
def connected(execution: Execution, cpus: int | None) -> Iterator[None]:
    """Connect to the cluster of `execution`; without an address, start Ray with `cpus` cores here, and end it.

    `cpus` is by default this machine's number of cores. Raises `UsageError` when nobody answers, when the cluster has
    no cores or GPUs, or when this process uses Ray already.
    """
    if ray.is_initialized():
        raise UsageError("executor: this process uses Ray already; call ray.shutdown() first")
    address = execution.ray_address
    if address is not None:
        _call(address)
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # its errors come as exceptions
    before = signal.getsignal(signal.SIGTERM)  # Ray sets its own handler
    own: dict[str, Any] = {"num_cpus": cpus or cores(), "include_dashboard": False} if address is None else {}
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.CRITICAL,
            **own,
        )
    except (RayError, OSError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        raise UsageError(f"ray_address: cannot use {where}: {first_line(error)}") from None
    finally:
        if before is not None and signal.getsignal(signal.SIGTERM) is not before:
            with contextlib.suppress(ValueError):  # not in the main thread: then Ray has set none
                signal.signal(signal.SIGTERM, before)
    try:
        if not room(execution.device):
            kind = "cores" if execution.device == "cpu" else "GPUs"
            raise UsageError(f"ray_address: the Ray cluster has no {kind}")
        yield
    finally:
        ray.shutdown()


def _call(address: str) -> None:
    """Raise `UsageError` unless a server like Ray's answers at `address`. Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER) as connection:
            if "RAY_USE_TLS" in os.environ:
                return
            connection.sendall(_HELLO)
            found = connection.recv(9)
    except (OSError, OverflowError, UnicodeError) as error:  # a port above 65535, a name with an empty label
        raise UsageError(
            f"ray_address: nobody answers at {address} ({first_line(error)}); `ray status` on the cluster's head node "
            "shows whether it runs"
        ) from None
    if found[3:4] != b"\x04":  # the type of the frame SETTINGS, the first one of every server of HTTP/2
        raise UsageError(f"ray_address: what answers at {address} is not Ray; the port is by default 6379")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; for an error in an actor, of that error."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {first_line(error.cause)}"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def room(device: str) -> int:
    """Return how many actors the cluster has room for: one a core, or several a GPU."""
    has = ray.cluster_resources()  # type: ignore[no-untyped-call, unused-ignore]
    return int(has.get("CPU", 0) if device == "cpu" else has.get("GPU", 0) * PER_GPU)


def actor(device: str) -> Any:
    """Return a new actor, whose `begin` makes an object, and whose `call` calls it.

    `begin` returns the host's name, the id of Ray's node, and the object's identity; or instead of the identity the
    reason for which the object cannot be made.
    """
    # The class is local, so that Ray sends its code: a node without pflbench can say so.

    class Actor:
        def begin(self, module: str, name: str, *arguments: Any) -> Any:
            import importlib
            import socket

            import ray

            host, node = socket.gethostname(), ray.get_runtime_context().get_node_id()
            try:
                self._made = getattr(importlib.import_module(module), name)(*arguments)
                return host, node, self._made.identity()
            except ModuleNotFoundError as error:
                return host, node, f"no module {error.name!r}; install the same packages there"
            except Exception as error:
                if type(error).__name__ != "UsageError":
                    raise
                return host, node, str(error)

        def call(self, method: str, *arguments: Any) -> Any:
            return getattr(self._made, method)(*arguments)

    share = {} if device == "cpu" else {"num_gpus": 1 / PER_GPU}
    remote: Any = ray.remote  # its types do not know these options
    return remote(num_cpus=1, max_restarts=0, max_task_retries=0, **share)(Actor).remote()
