"""The layers: a module imports only from its package and from lower packages, and no packages import each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each package, with the other packages that it may import.
GROUND = {"errors", "rng", "files"}
BASE = GROUND | {"settings", "spec", "federation", "participation"}
ROOMS = {
    "errors": set(),
    "rng": set(),
    "files": {"errors"},
    "datasets": GROUND,
    "settings": GROUND,
    "spec": GROUND | {"settings"},
    "federation": GROUND | {"datasets"},
    "published": GROUND | {"settings", "spec"},
    "participation": GROUND | {"settings", "spec"},
    "core": BASE,
    "algorithms": {"core"},
    "store": BASE | {"core"},
    "engine": BASE | {"core", "store", "datasets"},
    "sweep": BASE | {"published", "core", "store", "engine"},
    "reports": {"errors", "files", "settings", "spec", "published", "store.schema", "core.registry"},
    "cli": BASE | {"published", "core", "store", "engine", "sweep", "datasets", "reports"},
}


def modules():
    for folder in ("pflbench", "algorithms", "datasets", "reports"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield path, list(parts[1:] if parts[0] == "pflbench" else parts)


def imports(path, parts):
    """The modules of pflbench that a file imports, as their parts below the package."""
    package = parts if path.name == "__init__.py" else parts[:-1]
    package = [part for part in package if part != "__init__"]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *base]
            elif base[:1] == ["pflbench"]:
                base = base[1:]
            else:
                continue
            yield from ([*base, alias.name] for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1:] for alias in node.names if alias.name.startswith("pflbench."))


@pytest.mark.parametrize(("path", "parts"), list(modules()), ids=lambda v: ".".join(v) if isinstance(v, list) else "")
def test_a_module_imports_nothing_from_above(path, parts):
    room = parts[0]
    if room in ("__init__", "__main__"):  # the entry points may import every package
        return
    allowed = ROOMS[room] | {room}
    for found in imports(path, parts):
        assert found[0] in allowed or ".".join(found[:2]) in allowed, f"{path} imports {'.'.join(found)}"


def test_no_two_rooms_see_each_other():
    for room, seen in ROOMS.items():
        for other in seen:
            assert room not in ROOMS[other.split(".")[0]]


def test_no_module_is_too_long():
    long = {str(p.relative_to(ROOT)): n for p, _ in modules() if (n := len(p.read_text().splitlines())) > 350}
    assert long == {}
