"""Parameters by name, states that nest them, and functions of both. No function changes its inputs."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]
"""Parameters, or parameters and buffers, by name."""

State = Mapping[str, Any]
"""What a server or a client keeps, and what a message carries: mappings of any depth, with strings or integers as keys,
and tensors, integers and floats as leaves."""

Path = tuple[str | int, ...]


def read(net: nn.Module) -> Params:
    """Return a copy of the parameters and floating-point buffers of `net`, detached and contiguous."""
    return {name: slot.clone(memory_format=torch.contiguous_format) for name, slot in slots(net).items()}


def slots(net: nn.Module) -> Params:
    """Return the live parameters and floating-point buffers of `net`, detached: writing to them changes `net`."""
    named = (*net.named_parameters(), *net.named_buffers())
    return {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}


def in_head(name: str) -> bool:
    """Return whether a parameter belongs to the classifier head."""
    return name.startswith("head.")


def head(model: Params) -> Params:
    """Return the parameters of the classifier head."""
    return {name: model[name] for name in model if in_head(name)}


def body(model: Params) -> Params:
    """Return the parameters and buffers of the body, the layers before the head."""
    return {name: model[name] for name in model if name.startswith("body.")}


def linear_head(model: Params) -> bool:
    """Return whether the head of `model` is one `nn.Linear`, with or without a bias."""
    dimensions = {name: tensor.dim() for name, tensor in head(model).items()}
    return dimensions in ({"head.weight": 2}, {"head.weight": 2, "head.bias": 1})


def zeros_like(model: Params) -> Params:
    """Return zeros under the names of `model`."""
    return {name: torch.zeros_like(tensor) for name, tensor in model.items()}


def average(parts: Iterable[Mapping[str, Tensor]], weights: Sequence[float]) -> Params:
    """Return the weighted mean of `parts`, tensor by tensor, with `weights` normalised to sum 1.

    Sums are in float64 in the order of `parts`: the result does not depend on which client finished first, and a single
    part is returned exactly. A part's memory is free after it was added.
    """
    total = float(sum(weights))
    sums: Params = {}
    kinds: dict[str, torch.dtype] = {}
    for part, weight in zip(parts, weights, strict=True):
        for name in part if not sums else ():
            tensor = part[name]
            sums[name], kinds[name] = torch.zeros_like(tensor, dtype=torch.float64), tensor.dtype
        for name, out in sums.items():
            out.add_(part[name].double(), alpha=weight / total)
    return {name: out.to(kinds[name]) for name, out in sums.items()}


def distance(a: Params, b: Params) -> float:
    """Return the Euclidean distance of `a` and `b`, which have the same names, in any order."""
    return math.sqrt(math.fsum(float((t.double() - b[name].double()).square().sum()) for name, t in a.items()))


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the path and the value of every leaf of a state, in the state's order."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, tree


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of a state."""
    return (leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor))


def nbytes(tree: Any) -> int:
    """Return the bytes of a state: the bytes of its tensors, and 8 for each number. Keys are not counted."""
    return sum(t.numel() * t.element_size() if isinstance(t, Tensor) else 8 for _, t in leaves(tree))


def fingerprint(tree: Any, digest: Callable[[Tensor], str] | None = None) -> str:
    """Return the SHA-256 of the names, types, shapes and values of a state. It does not depend on the state's order.

    `digest` replaces `tensor_digest` if the caller knows some digests already.
    """
    lines = []
    for path, leaf in leaves(tree):
        value = (digest or tensor_digest)(leaf) if isinstance(leaf, Tensor) else repr(leaf)
        lines.append(f"{path[0] if len(path) == 1 else path} {value}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's type, shape and bytes."""
    t = tensor.detach().contiguous()
    digest = hashlib.sha256(f"{t.dtype} {tuple(t.shape)}\n".encode())
    digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
