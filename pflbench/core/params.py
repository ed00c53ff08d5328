"""Parameters by name, and the few things that are done with them. Values: nothing here changes its inputs."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]
State = dict[str, Params]


def read(net: nn.Module) -> Params:
    """Return a copy of the parameters and floating-point buffers of `net`, detached and contiguous."""
    return {name: slot.clone(memory_format=torch.contiguous_format) for name, slot in slots(net).items()}


def slots(net: nn.Module) -> Params:
    """Return the live parameters and floating-point buffers of `net`, detached: writing to them changes `net`."""
    named = (*net.named_parameters(), *net.named_buffers())
    return {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}


def merge(*parts: Mapping[str, Tensor]) -> Params:
    """Return the union of `parts`; where a name stands in several, the last one's tensor."""
    return {name: tensor for part in parts for name, tensor in part.items()}


def zeros_like(params: Params) -> Params:
    """Return zeros under the names of `params`."""
    return {name: torch.zeros_like(tensor) for name, tensor in params.items()}


def linear_head(model: Params) -> bool:
    """Say whether the head of `model` is one `nn.Linear`, with or without a bias."""
    head = {name: tensor.dim() for name, tensor in model.items() if name.startswith("head.")}
    return head in ({"head.weight": 2}, {"head.weight": 2, "head.bias": 1})


def average(parts: Iterable[Params], weights: Sequence[float]) -> Params:
    """Return the weighted mean of `parts`, tensor by tensor, with `weights` normalised to sum 1.

    Sums run in float64 in the order of `parts`, so that the result does not depend on who finished first, and one part
    alone comes back exactly. No part is held when it has been added.
    """
    total = float(sum(weights))
    sums: Params = {}
    kinds: dict[str, torch.dtype] = {}
    for part, weight in zip(parts, weights, strict=True):
        if not sums:
            sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in part.items()}
            kinds = {name: tensor.dtype for name, tensor in part.items()}
        for name, out in sums.items():
            out.add_(part[name].double(), alpha=weight / total)
    return {name: out.to(kinds[name]) for name, out in sums.items()}


def distance(a: Params, b: Params) -> float:
    """Return the Euclidean distance of `a` and `b`, which have the same names, in whatever order."""
    return math.sqrt(math.fsum(float((t.double() - b[name].double()).square().sum()) for name, t in a.items()))


def nbytes(parts: Iterable[Params]) -> int:
    """Return the bytes of all tensors in `parts`."""
    return sum(t.numel() * t.element_size() for part in parts for t in part.values())


def fingerprint(params: Params, digest: Callable[[Tensor], str] | None = None) -> str:
    """Return the SHA-256 of names, types, shapes and bytes of `params`, whatever their order.

    `digest` may stand for the function below, where it knows digests already.
    """
    lines = [f"{name} {(digest or tensor_digest)(params[name])}" for name in sorted(params)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's type, shape and bytes."""
    t = tensor.detach().contiguous()
    digest = hashlib.sha256(f"{t.dtype} {tuple(t.shape)}\n".encode())
    digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
