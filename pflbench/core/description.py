"""Descriptions of methods, read from their files without importing the methods or torch."""

import ast
import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pflbench import settings


@dataclasses.dataclass(frozen=True)
class Description:
    """A method's docstring, and its hyperparameters by name: dataclass fields made by `pflbench.settings.setting`."""

    text: str
    hyperparameters: "Mapping[str, dataclasses.Field[Any]]"


class UnreadableError(Exception):
    """A file's text is not enough: it computes a value that must be a literal, or it lacks the class."""


LINES = ("Paper", "Family", "Personal", "Sent", "Evaluated", "Reported", "Deviations")
"""The labelled lines of a method's docstring; the last one may be missing."""


def lines(text: str) -> dict[str, str]:
    """Return the text of each of `LINES` in a method's docstring; its first paragraph, too, as "Title"."""
    parts = re.split(rf"^({'|'.join(LINES)}): ", text, flags=re.MULTILINE)
    found = {"Title": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}
    return {label: " ".join(part.split()) for label, part in found.items()}


def published(text: str) -> tuple[str, int] | None:
    """Return where and when a method's paper appeared, from its docstring; "arXiv" for one that names no venue."""
    found = re.search(r", (?:([A-Z][A-Za-z ]*) )?(20\d\d)\b", lines(text).get("Paper", ""))
    return (found.group(1) or "arXiv", int(found.group(2))) if found else None


def title(text: str) -> str | None:
    """Return the method's name in its paper: up to three words before the first colon of its docstring."""
    found = re.match(r"([\w.+-]+(?: [\w.+-]+){0,2}):\s", text)
    return found.group(1) if found else None


def docstring(module: str) -> str:
    """Return the docstring of `module`. Raises `UnreadableError` when it has no file, or no valid Python in it."""
    return ast.get_docstring(_File(module).tree) or ""


def read(module: str, name: str) -> Description:
    """Return what the file of `module` says about the method that it registers as `name`.

    Raises `UnreadableError` when the file's text is not enough.
    """
    file = _File(module)
    for node in file.classes.values():
        if any((call := _call(d, "register")) and call[0] == [name] for d in node.decorator_list):
            return Description(ast.get_docstring(file.tree) or "", settings.fields(_copy(file, node, {})))
    raise UnreadableError


class _File:
    """The file of a module, parsed, with its classes by name."""

    def __init__(self, module: str) -> None:
        try:
            spec = importlib.util.find_spec(module)
            if spec is None or spec.origin is None:
                raise UnreadableError
            self.tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        except (ImportError, OSError, ValueError, SyntaxError):  # ValueError: not UTF-8, or a module without a spec
            raise UnreadableError from None
        self.module = module
        self.classes = {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}
        self._package = spec.parent or ""

    def origin(self, name: str) -> tuple[str, str]:
        """Return the module from which `name` is imported, and the name in that module."""
        for node in (node for node in self.tree.body if isinstance(node, ast.ImportFrom)):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    module = "." * node.level + (node.module or "")
                    return importlib.util.resolve_name(module, self._package), alias.name
        raise UnreadableError


_Copies = dict[tuple[str, str], type]


def _copy(file: _File, node: ast.ClassDef, known: _Copies) -> type:
    """Return a dataclass with only the bases and the fields of a class.

    `known` has the copies so far: a base that two classes share must be one class.
    """
    key = file.module, node.name
    if key not in known:
        bases = tuple(_base(file, base, known) for base in node.bases)
        fields = [
            (item.target.id, Any, _field(item.value))
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None
        ]
        known[key] = dataclasses.make_dataclass(node.name, fields, bases=bases)
    return known[key]


def _base(file: _File, base: ast.expr, known: _Copies) -> type:
    if not isinstance(base, ast.Name):
        raise UnreadableError
    if base.id in file.classes:
        return _copy(file, file.classes[base.id], known)
    module, name = file.origin(base.id)
    if name == "Algorithm" and module.split(".")[:2] in (["pflbench"], ["pflbench", "core"]):
        return known.setdefault(("", name), type(name, (), {}))
    other = _File(module)
    if name not in other.classes:
        raise UnreadableError
    return _copy(other, other.classes[name], known)


def _field(value: ast.expr) -> Any:
    """Return the field that `value` makes. A constant is not a setting: it hides an inherited setting of that name."""
    if not isinstance(value, ast.Call):
        return None
    call = _call(value, "setting")
    if call is None:
        raise UnreadableError
    try:
        return settings.setting(*call[0], **call[1])
    except TypeError:  # the import will show the author the place
        raise UnreadableError from None


def _call(node: ast.expr, function: str) -> tuple[list[Any], dict[str, Any]] | None:
    """Return the arguments of a call of `function`, None for any other expression."""
    if not isinstance(node, ast.Call):
        return None
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
    if called != function:
        return None
    if any(keyword.arg is None for keyword in node.keywords):
        raise UnreadableError
    try:
        return [ast.literal_eval(a) for a in node.args], {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except ValueError:
        raise UnreadableError from None
