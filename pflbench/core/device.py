"""Devices, and a process's copy of the network. All code that depends on the device or the number format is here."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pflbench.core import params
from pflbench.core.models import Net
from pflbench.core.params import Params
from pflbench.errors import MethodError, UsageError
from pflbench.federation import Split

T = TypeVar("T")
_CHUNK = 128  # samples in a forward pass that needs no gradient


def chunks(n: int) -> Iterator[slice]:
    """Yield slices that cover n samples, for forward passes that need no gradient."""
    return (slice(i, i + _CHUNK) for i in range(0, n, _CHUNK))


@dataclasses.dataclass(frozen=True)
class Device:
    """Where a worker computes: torch's type of a device, and its number among the devices of this type.

    States, messages and data are at home, on the CPU. What a job needs is copied to the device when the job starts, and
    its results are copied home when it ends.
    """

    type: str = "cpu"
    index: int = 0

    @property
    def torch(self) -> torch.device:
        """The device as torch has it."""
        return torch.device(self.type) if self.type == "cpu" else torch.device(self.type, self.index)

    def to(self, value: T) -> T:
        """Return `value` on the device. It is a tensor, samples, or mappings of any depth with tensors in them."""
        return value if self.type == "cpu" else _moved(value, self.torch)

    @staticmethod
    def home(value: T) -> T:
        """Return `value` on the CPU; what is there already is not copied."""
        return _moved(value, torch.device("cpu"))

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Compute with the same bits every time, and without TF32, which keeps only 10 bits of a float32's fraction.

        Must be entered before the process uses the device. The settings of before are restored.
        """
        if self.type == "cpu":
            yield
            return
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        cudnn, matmul, filling = torch.backends.cudnn, torch.backends.cuda.matmul, torch.utils.deterministic
        wanted = (
            (cudnn, "benchmark", False), (cudnn, "deterministic", True), (cudnn, "allow_tf32", False),
            (matmul, "allow_tf32", False), (filling, "fill_uninitialized_memory", False),
        )  # fmt: skip
        with contextlib.ExitStack() as stack:
            for module, name, value in wanted:
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
            stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
            torch.use_deterministic_algorithms(True)
            yield


CPU = Device()


def _moved(value: T, to: torch.device) -> T:
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(to)
    elif isinstance(value, Split):
        moved = Split(value.x.to(to), value.y.to(to))
    elif isinstance(value, Mapping):
        moved = {key: _moved(leaf, to) for key, leaf in value.items()}
    return moved  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of one type that a process sees.

    `facts` is what a record says of them: the name, and for CUDA the capability and the versions of CUDA and cuDNN.
    """

    type: str = "cpu"
    count: int = 1
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def of(self, worker: int) -> Device:
        """Return the device of a worker, by its number: neighbours are on different devices."""
        return Device(self.type, worker % self.count)

    def describe(self) -> dict[str, Any]:
        """Return what a record says of the devices."""
        return {"type": self.type, **({} if self.type == "cpu" else {**self.facts, "count": self.count})}


def _cuda() -> Devices:
    cuda = torch.version.cuda
    if cuda is None:
        raise UsageError(
            f"device: this torch, {torch.__version__}, is built without CUDA; install torch with CUDA "
            "(https://pytorch.org/get-started/locally), or leave --device out"
        )
    if not torch.cuda.is_available():
        raise UsageError(
            f"device: torch {torch.__version__} with CUDA {cuda} sees no GPU; check nvidia-smi, the driver and "
            f"CUDA_VISIBLE_DEVICES ({os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}), or leave --device out"
        )
    facts = {
        "name": ", ".join(dict.fromkeys(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cuda": cuda,
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
    }
    return Devices("cuda", torch.cuda.device_count(), facts)


def _mps() -> Devices:
    if not torch.backends.mps.is_available():
        why = "does not find one" if torch.backends.mps.is_built() else "is built without MPS"
        raise UsageError(
            f"device: mps needs a GPU of Apple, and this torch, {torch.__version__}, {why}; leave --device out"
        )
    return Devices("mps")


TYPES: dict[str, Callable[[], Devices]] = {"cpu": Devices, "cuda": _cuda, "mps": _mps}
"""How the devices of each type are found. A function raises `UsageError` if there are none; it uses the device, so a
process that will fork must not call it."""

OutOfMemory = torch.cuda.OutOfMemoryError
"""The error of a device whose memory is full."""


def in_use() -> str | None:
    """Return the type of a device that this process has used: a forked process could not use it."""
    return "cuda" if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]


def has_bf16(device: str) -> bool:
    """Return whether a type of device has instructions for bfloat16. Of devices other than the CPU this is assumed."""
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return device != "cpu" or bool(onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def numbers(scalars: Sequence[Tensor]) -> list[Any]:
    """Return the values of `scalars`; the device is waited for once, not once for each."""
    return torch.stack(list(scalars)).cpu().tolist() if scalars else []


@dataclasses.dataclass
class Replica:
    """One process's copy of the network, and the parameters that it holds. Only parameters that differ are loaded.

    With `precision` "bf16", forward passes within `forward()` run in bfloat16.
    """

    net: Net
    precision: str = "fp32"
    device: Device = CPU
    loaded: Params = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.net.to(self.device.torch).to(memory_format=torch.channels_last)
        self.slots = params.slots(self.net)
        self.dtype = next(iter(self.slots.values())).dtype
        # A forward pass in training mode may change these.
        self.buffers = {name for name, _ in self.net.named_buffers() if name in self.slots}
        # Integers (BatchNorm's count of batches) are not part of a state: every load resets them.
        self._counts = [(b, b.clone()) for b in self.net.buffers() if not b.is_floating_point()]

    def __call__(self, model: Params, x: Tensor) -> Tensor:
        """Return the logits [n, classes] of `x` under the parameters `model`, in evaluation mode."""
        logits: Tensor = self.load(model).eval()(x.clone())
        return logits

    def features(self, model: Params, x: Tensor) -> Tensor:
        """Return the features [n, d] of `x` under the parameters `model`, in evaluation mode."""
        found: Tensor = self.load(model).eval().body(x.clone())
        return found

    def forward(self) -> contextlib.AbstractContextManager[object]:
        """Return the context for a forward pass."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def load(self, values: Params) -> Net:
        """Copy `values` into the network and return it. Raises `MethodError` when one is missing or misshapen."""
        for name, slot in self.slots.items():
            value = values.get(name)
            if value is None:
                given = ", ".join(values) or "none"
                raise MethodError(f"the network needs the parameter {name!r}; the given parameters are: {given}")
            if name in self.buffers or self.loaded.get(name) is not value:
                if value.shape != slot.shape:
                    shapes = f"{tuple(value.shape)}; the network's has {tuple(slot.shape)}"
                    raise MethodError(f"the parameter {name!r} has the shape {shapes}")
                slot.copy_(value)
        for count, first in self._counts:
            count.copy_(first)
        self.loaded = dict(values)
        return self.net

    def statistics(self) -> Params:
        """Return a copy of the network's floating-point buffers, such as running statistics."""
        return {name: self.slots[name].clone() for name in self.buffers}

    def batch(self, x: Tensor, index: Tensor | slice) -> Tensor:
        """Return samples `index` of `x` as the network takes them: floating-point, images channels-last."""
        images = x.dim() == 4
        rows = x.permute(0, 2, 3, 1) if images else x
        # A slice is copied: a network's first layer may work in place, and must not change the data.
        view = isinstance(index, slice)
        out = (rows[index] if isinstance(index, slice) else rows.index_select(0, index)).to(self.dtype, copy=view)
        if images:
            out = out.permute(0, 3, 1, 2)
        # uint8 0..255 to [-1, 1]: torchvision's ToTensor and Normalize(0.5, 0.5), as in PFLlib.
        return out.mul_(1 / 127.5).sub_(1) if x.dtype == torch.uint8 else out


def plain(body: nn.Module) -> bool:
    """Return whether a frozen `body` gives a sample the same features in every epoch."""
    kinds = (nn.Sequential, nn.Conv2d, nn.Linear, nn.ReLU, nn.MaxPool2d, nn.Flatten)
    return all(type(module) in kinds for module in body.modules())
