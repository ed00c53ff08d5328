"""States in safetensors files: mappings of any depth, with tensors and numbers as leaves.

A file holds the tensors under their paths. Its metadata holds the tree: the keys in their order, and the numbers.
Nothing is pickled.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from pflbench import files
from pflbench.core.params import State, leaves
from pflbench.errors import MethodError


@dataclasses.dataclass(frozen=True)
class StateRef:
    """A state in a file of the checkpoint folder."""

    file: str
    sha256: str


def check_state(state: Any, owner: str) -> None:
    """Raise `MethodError` unless `state` is made of mappings, tensors and numbers. `owner` names it in the message."""
    if not isinstance(state, Mapping):
        raise MethodError(f"{owner} is of type {type(state).__name__}; a state is a dict of tensors and numbers")
    _check(state, owner, ())


def _check(tree: Mapping[Any, Any], owner: str, path: tuple[str, ...]) -> None:
    for key, value in tree.items():
        name = "/".join((*path, str(key)))
        if not isinstance(key, str | int):
            raise MethodError(f"{owner} has a key at {name!r} that is neither a string nor an integer")
        if isinstance(value, Mapping):
            _check(value, owner, (*path, str(key)))
        elif not isinstance(value, Tensor | int | float):
            kind = type(value).__name__
            raise MethodError(f"{owner} has a {kind} at {name!r}; leaves are tensors, integers and floats")
        elif isinstance(value, Tensor) and value.dtype == torch.bfloat16:  # NumPy, which our pipes use, has no bfloat16
            raise MethodError(f"{owner} has a bfloat16 tensor at {name!r}; keep and send float32")


def digest(state: State) -> str:
    """Return the SHA-256 of the file in which `save_state` would save a state."""
    return hashlib.sha256(_encode(state)[0]).hexdigest()


def save_state(state: State, folder: Path, file: str) -> StateRef:
    """Write `state` to `folder/file`."""
    data, _ = _encode(state)
    with files.writing(folder):
        files.write(folder / file, data)
    return StateRef(file, hashlib.sha256(data).hexdigest())


def load_state(path: Path) -> dict[str, Any]:
    """Return the state in file `path`; its tensors are mapped from the file, not copied."""
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = _decode(_tree(file.metadata(), list(file.keys())), file.get_tensor)
    return found


class UploadFile(Mapping[Any, Any]):
    """An upload's content in a file. Each access to a tensor reads it from the file; nothing is cached.

    So a round's uploads need only the memory of the tensors in use.
    """

    def __init__(self, path: Path, tree: Any) -> None:
        self._path = path
        self._tree: dict[str | int, Any] = dict(tree["d"])

    @classmethod
    def write(cls, content: State, path: Path) -> "UploadFile":
        """Write `content` to file `path`."""
        data, tree = _encode(content)
        with files.writing(path.parent):
            files.write(path, data)
        return cls(path, tree)

    def __len__(self) -> int:
        return len(self._tree)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._tree)

    def __contains__(self, key: object) -> bool:
        return key in self._tree

    def __getitem__(self, key: Any) -> Any:
        node = self._tree[key]
        if "d" in node:
            return UploadFile(self._path, node)
        if "n" in node:
            return node["n"]
        with safe_open(self._path, "pt") as file:
            return file.get_tensor(node["t"])

    def __or__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return {**self, **other}

    def __ror__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return {**other, **self}


def plain(content: Any) -> Any:
    """Return a state as plain dicts of contiguous tensors, as it would be read from a file; uploads in files are read.

    A sum over a tensor depends on the order of its numbers in memory, and results must not depend on the store.
    """
    if isinstance(content, Mapping):
        return {key: plain(value) for key, value in content.items()}
    return content.contiguous() if isinstance(content, Tensor) else content


def _keys(state: State) -> dict[tuple[str | int, ...], str]:
    """Return the name of each tensor in a file, by its path."""
    names: dict[tuple[str | int, ...], str] = {}
    used = {"__metadata__"}  # the format reserves this name
    for path, leaf in leaves(state):
        if isinstance(leaf, Tensor):
            name = "/".join(map(str, path))
            while name in used:  # a state may have both keys 1 and "1"
                name += "'"
            used.add(name)
            names[path] = name
    return names


def _shape(tree: Any, keys: Mapping[tuple[str | int, ...], str], path: tuple[str | int, ...] = ()) -> dict[str, Any]:
    """Return a tree as JSON: "d" has a mapping's items, "t" the name of a tensor, "n" a number."""
    if isinstance(tree, Mapping):
        return {"d": [[key, _shape(value, keys, (*path, key))] for key, value in tree.items()]}
    return {"t": keys[path]} if isinstance(tree, Tensor) else {"n": tree}


def _encode(state: State) -> tuple[bytes, dict[str, Any]]:
    """Return the contents of a state's file, and its tree as the metadata has it."""
    keys = _keys(state)
    tree = _shape(state, keys)
    # Cloned because safetensors refuses tensors that share memory.
    tensors = {keys[path]: leaf.contiguous().clone() for path, leaf in leaves(state) if isinstance(leaf, Tensor)}
    return save(tensors, metadata={"tree": json.dumps(tree)}), tree


def _tree(metadata: Mapping[str, str], names: list[str]) -> Any:
    if "tree" in metadata:
        return json.loads(metadata["tree"])
    # A state in the first records of pflbench 0.1: parts with tensors.
    parts: dict[str, list[Any]] = {part: [] for part in json.loads(metadata["parts"])}
    for name in names:
        part, _, key = name.partition("/")
        parts[part].append([key, {"t": name}])
    return {"d": [[part, {"d": items}] for part, items in parts.items()]}


def _decode(node: Any, tensor: Any) -> Any:
    if "d" in node:
        return {key: _decode(value, tensor) for key, value in node["d"]}
    return node["n"] if "n" in node else tensor(node["t"])


class ClientStates(Mapping[int, State]):
    """The states of all clients by number, read from their files when they are used.

    `changed` has the states that differ from `initial`; a `StateRef` names a file in `folder`.
    """

    def __init__(
        self, clients: int, initial: State, changed: "dict[int, State | StateRef]", folder: Path | None
    ) -> None:
        self.initial = initial
        self.changed = changed
        self.folder = folder
        self._clients = clients

    def __len__(self) -> int:
        return self._clients

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._clients))

    def stored(self, client: int) -> State | StateRef:
        """Return a client's state, or the reference to its file, without reading the file."""
        return self.changed.get(client, self.initial)

    def __getitem__(self, client: int) -> State:
        if client not in range(self._clients):
            raise KeyError(client)
        return read(self.stored(client), self.folder)

    def digests(self) -> list[str]:
        """Return the SHA-256 of every client's state."""
        initial = digest(self.initial)
        found = {c: s.sha256 if isinstance(s, StateRef) else digest(s) for c, s in self.changed.items()}
        return [found.get(client, initial) for client in self]


def read(state: State | StateRef, folder: Path | None) -> State:
    """Return a state, read from its file in `folder` if it is a `StateRef`."""
    if not isinstance(state, StateRef):
        return state
    assert folder is not None  # noqa: S101
    return load_state(folder / state.file)
