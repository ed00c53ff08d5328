"""Write docs/fidelity.md: what each method takes from its paper, and the tests that check it.

Run as `python tests/fidelity.py > docs/fidelity.md`.
"""

import ast
import importlib
import sys
import textwrap
from pathlib import Path
from typing import Any

from pflbench.core import description, registry
from pflbench.core.description import LINES

ROOT = Path(__file__).parents[1]
INTRODUCTION = """\
# Fidelity

What each method takes from its paper, and the tests that hold it to that. `python tests/fidelity.py` makes this page
from the methods' docstrings and the tests; a test fails when it is not current.

Every method has an oracle test: two rounds or more on a small network, in float64, worked out in the test from the
paper's equations without our code (but for what is drawn at random), and compared to 1e-9: the states of server and
clients, and the model that each client is tested with.

"Bytes" are those of one client in one round; a test compares them with what runs record. BODY and HEAD are the
bytes of the network's two parts, BODY without BatchNorm where that is personal. PROTOTYPES are the bytes of a mean
feature and a count for each class.
"""


def methods() -> list[str]:
    """Return the names of the methods in `algorithms/`."""
    found = registry.algorithms()
    return [name for name in sorted(found) if (ROOT / "algorithms" / f"{_file(name)}.py").exists()]


def lines(name: str) -> dict[str, str]:
    """Return the labelled lines of the docstring of method `name`."""
    return description.lines(importlib.import_module(registry.algorithm(name).__module__).__doc__ or "")


def sent() -> dict[str, tuple[str, str]]:
    """Return the closed forms of the bytes of uploads and downloads, by method and setting, from the test files."""
    (ordinary,) = _assigned(ROOT / "tests" / "facts.py", "MODEL")
    found = {}
    for name in methods():
        (facts,) = _assigned(_tests_of(name), "FACTS")
        table = next((keyword.value for keyword in facts.keywords if keyword.arg == "bytes"), ordinary)
        for setting, both in zip(table.keys, table.values, strict=True):
            found[f"{name} {ast.literal_eval(setting)}".strip()] = tuple(map(ast.unparse, both.elts))
    return found


def tests(name: str) -> list[str]:
    """Return the names of the tests of method `name`, as sentences."""
    tree = ast.parse(_tests_of(name).read_text(encoding="utf-8"))
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [function.removeprefix("test_").replace("_", " ") for function in functions if function.startswith("test_")]


def page() -> str:
    """Return the page."""
    bytes_sent = sent()
    out = [INTRODUCTION]
    for name in methods():
        said = lines(name)
        title, _, does = said["Title"].partition(": ")
        cases = [
            f"{', '.join(settings)}{': ' if settings else ''}{up} up, {down} down"
            for (algo, *settings), (up, down) in ((case.split(), both) for case, both in bytes_sent.items())
            if algo == name
        ]
        rows = {label: said.get(label, "none.") for label in LINES}
        rows |= {"Bytes": f"{'; '.join(cases)}.", "Tests": f"{'; '.join(tests(name))}."}
        out.append(f"## {title}, `{name}`\n{does[:1].upper()}{does[1:]}\n")
        out.append("\n".join(_wrapped(f"- **{label}**: {text}") for label, text in rows.items()) + "\n")
    return "\n".join(out)


def _file(name: str) -> str:
    return name.replace("-", "_")


def _tests_of(name: str) -> Path:
    return ROOT / "tests" / "algorithms" / f"test_{_file(name)}.py"


def _assigned(path: Path, name: str) -> list[Any]:
    """Return the expressions that a module assigns to `name`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == name]


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.stdout.write(page())
