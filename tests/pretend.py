"""A device that is not there, for tests on machines without a GPU.

Its tensors say `pretend:0`, compute real numbers on the CPU, and refuse to meet CPU tensors, as those of a GPU do. It
counts synchronisations: the times that the CPU would wait for the device. As on CUDA, CPU scalars of no dimension may
meet device tensors, and `t[i]` takes an index on the CPU.
"""

import contextlib
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from pflbench.core import device
from pflbench.core.device import Devices

try:  # a private name of torch
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
except ImportError:
    pytest.skip("this torch has no backends in Python", allow_module_level=True)

_setup_privateuseone_for_python_backend("pretend")
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default}
WAITS = {aten.nonzero.default, aten.masked_select.default, aten.bincount.default, aten.equal.default}
"""Operations whose result's size or value the CPU must know."""
syncs: Counter[str] = Counter()
computed: Counter[str] = Counter()
"""Operations that are no views, by name: each would be a kernel."""


class Away(torch.Tensor):
    """A tensor on the device; `home` has its values. It always says `pretend:0`: torch's backend has one device."""

    @staticmethod
    def __new__(cls, home):
        return torch.Tensor._make_wrapper_subclass(
            cls, home.shape, strides=home.stride(), storage_offset=home.storage_offset(), dtype=home.dtype,
            device="pretend:0",
        )  # fmt: skip

    def __init__(self, home):
        self.home = home

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Within it `torch.zeros(..., device="pretend:0")` and `t.to("pretend:0")` work."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def _compute(func, args, kwargs):
    flat, _ = tree_flatten((args, kwargs))
    away = [t for t in flat if isinstance(t, Away)]
    home = [t for t in flat if isinstance(t, torch.Tensor) and not isinstance(t, Away)]
    device = kwargs.get("device")
    if away and (func in WAITS or func is aten._local_scalar_dense.default):
        syncs[str(func)] += 1
    if func not in MOVES and away:
        if any(t.dim() > 0 for t in home) and func is not aten.index.Tensor:
            raise RuntimeError(f"{func}: tensors on two devices")
        if func._schema.is_mutable and isinstance(args[0], torch.Tensor) and not isinstance(args[0], Away):
            raise RuntimeError(f"{func}: writes to the CPU what is on the device")
    to_away = torch.device(device).type == "pretend" if device is not None else bool(away)
    if func is aten.copy_.default:
        to_away = isinstance(args[0], Away)
    if func is aten._local_scalar_dense.default:
        to_away = False
    if func is aten._to_copy.default and away and not to_away:
        syncs["to home"] += 1
    if (away and home and func is aten.index.Tensor) or (func in MOVES and home and to_away and not away):
        syncs["from home"] += 1
    if away and not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
        computed[str(func)] += 1
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map_only(Away, lambda t: t.home, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if func._schema.is_mutable and isinstance(args[0], Away) and out is args[0].home:
        return args[0]
    return tree_map_only(torch.Tensor, Away, out) if to_away else out


def reset():
    """Let the counters begin at 0."""
    syncs.clear()
    computed.clear()


@contextlib.contextmanager
def devices(count):
    """Give this process `count` devices of type "pretend"; the counters begin at 0."""
    reset()
    found = Devices("pretend", count, {"name": "Pretend 3000", "capability": "1.0"})
    with pytest.MonkeyPatch.context() as patch, _Mode():
        patch.setitem(device.TYPES, "pretend", lambda: found)
        yield
