"""A process's copy of the network. All code that depends on the device and the number format is in this module."""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pflbench.core import params
from pflbench.core.models import Net
from pflbench.core.params import Params
from pflbench.errors import MethodError

_CHUNK = 128  # samples in a forward pass that needs no gradient


def chunks(n: int) -> Iterator[slice]:
    """Yield slices that cover n samples, for forward passes that need no gradient."""
    return (slice(i, i + _CHUNK) for i in range(0, n, _CHUNK))


@dataclasses.dataclass
class Replica:
    """One process's copy of the network, and the parameters that it holds. Only parameters that differ are loaded.

    With `precision` "bf16", forward passes within `forward()` run in bfloat16.
    """

    net: Net
    precision: str = "fp32"
    loaded: Params = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.net.to(memory_format=torch.channels_last)
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
        return torch.autocast("cpu", torch.bfloat16)

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
