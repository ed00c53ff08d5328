"""Image trees: PATH/train/<class>/* and PATH/test/<class>/*, decoded once and cached by their fingerprint."""

import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pflbench import files
from pflbench.errors import UsageError

from .dataset import Dataset

_PARTS = ("train", "test")
_CANONICAL = re.compile(r"(?P<name>[^/\\]+)@(?P<key>[0-9a-f]{12})")


def resolve(path_or_name: str, data_dir: Path) -> str:
    """Cache an image tree, and return its name `folder:<last part of the path>@<12 hex digits of its fingerprint>`.

    Takes a path, or the `<name>@<fingerprint>` of a tree that `data_dir` already holds. The fingerprint covers the
    relative paths and the bytes of all image files. Hidden files and files without an image suffix are ignored.
    Raises `UsageError`.
    """
    root = Path(path_or_name).expanduser()
    known = _CANONICAL.fullmatch(path_or_name)
    if known and not root.exists():
        load(f"folder:{path_or_name}", data_dir)
        return f"folder:{path_or_name}"
    files = _files(root)
    key = _content_hash(root, files)
    cache = _cache(data_dir, key)
    if _read(cache) is None:
        _write(cache, *_decode(files))
    return f"folder:{root.resolve().name}@{key}"


def load(name: str, data_dir: Path) -> Dataset:
    """Return the cached image tree `name`, as returned by `resolve`; grey trees have one channel, others three (RGB).

    Raises `UsageError` if `data_dir` does not hold it.
    """
    known = _CANONICAL.fullmatch(name.removeprefix("folder:"))
    if not known:
        raise UsageError(f"dataset {name!r} has not been read yet; resolve it first")
    cache = _cache(data_dir, known["key"])
    found = _read(cache)
    if found is None:
        raise UsageError(f"dataset {name!r} is missing or damaged in {cache.parent}; give its path as folder:PATH")
    images, labels, n_train, classes = found
    return Dataset(name=name, classes=classes, images=images, labels=labels, n_train=n_train)


_Decoded = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], int, tuple[str, ...]]


def _cache(data_dir: Path, key: str) -> Path:
    return data_dir / "folders" / f"{key}.npz"


def _read(cache: Path) -> _Decoded | None:
    # The file is not compressed, so reading is fast; the checksums of the zip format detect damage.
    try:
        with np.load(cache, allow_pickle=False) as cached:
            classes = tuple(str(name) for name in cached["classes"])
            return cached["images"], cached["labels"], int(cached["n_train"]), classes
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _write(
    cache: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], n_train: int, classes: tuple[str, ...]
) -> None:
    try:
        with files.scratch(cache) as folder:
            made = folder / cache.name
            np.savez(made, images=images, labels=labels, n_train=np.int64(n_train), classes=np.array(classes))
            made.replace(cache)
    except OSError as error:
        raise UsageError(f"cannot write {cache} ({error.strerror}): choose another --data-dir") from error


def _files(root: Path) -> list[Path]:
    """Return all image files below `root`, sorted by part and relative path."""
    from PIL import Image

    # Load the common formats first: otherwise Pillow tries dozens of rare decoders, in alphabetical order.
    Image.preinit()
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    try:
        kind = "a folder" if root.is_dir() else "not a folder" if root.exists() else "not there"
    except OSError as error:
        raise UsageError(f"folder:{root} cannot be read ({error.strerror}); give an image tree") from error
    if kind != "a folder":
        raise UsageError(f"folder:{root} is {kind}; give an image tree")
    found = []
    for part in _PARTS:
        if not (root / part).is_dir():
            raise UsageError(f"{root} has no folder {part}/; images belong into {part}/<class>/")
        here = [
            path
            for kind in _visible(root / part)
            if kind.is_dir()
            for path in _visible(kind)
            if path.suffix.lower() in suffixes and not path.is_dir()
        ]
        if not here:
            raise UsageError(f"{root / part} holds no images; they belong into {part}/<class>/")
        found += here
    classes = {path.parent.name for path in found if path.parent.parent.name == "train"}
    stray = sorted({path.parent.name for path in found} - classes)
    if stray:
        raise UsageError(f"class {stray[0]!r} has images in {root / 'test'} but none in train/; add or remove it")
    return found


def _visible(folder: Path) -> Iterator[Path]:
    try:
        return iter(sorted(path for path in folder.iterdir() if not path.name.startswith(".")))
    except OSError as error:
        raise UsageError(f"cannot read {folder} ({error.strerror}): correct its permissions") from error


def _content_hash(root: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        data = _bytes(path)
        # Name and length come before the content, so two different trees never give the same bytes.
        digest.update(os.fsencode(path.relative_to(root).as_posix()) + b"\0" + len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:12]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): repair or remove it") from error


def _decode(files: list[Path]) -> _Decoded:
    arrays = []
    for path in files:
        arrays.append(_image(path))
        if arrays[-1].shape[:2] != arrays[0].shape[:2]:
            sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (arrays[-1], arrays[0])]
            raise UsageError(f"{path} is {sizes[0]} but {files[0]} is {sizes[1]}; all images must have one size")
    channels = max(array.shape[2] for array in arrays)
    # If one image has colour, grey images get three equal channels.
    images = np.stack([np.broadcast_to(array, (*array.shape[:2], channels)) for array in arrays])
    names = [path.parent.name for path in files]
    classes = tuple(sorted(set(names)))
    number = {name: index for index, name in enumerate(classes)}
    n_train = sum(path.parent.parent.name == "train" for path in files)
    return images, np.array([number[name] for name in names], dtype=np.int64), n_train, classes


def _image(path: Path) -> npt.NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode = image.mode
            array = np.asarray(image.convert("L" if mode in ("1", "L") else "RGB"))
    except Exception as error:  # Pillow's decoders raise many types of errors, without a common base class
        raise UsageError(f"{path} is not a readable image ({type(error).__name__}): repair or remove it") from error
    if mode.startswith(("I", "F")):
        # Pillow would silently clip 16- and 32-bit values at 255.
        raise UsageError(f"{path} has more than 8 bits a channel (mode {mode}): convert it to 8 bits")
    return array if array.ndim == 3 else array[..., np.newaxis]
