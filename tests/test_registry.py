"""The registry: it describes methods, mostly without importing them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pflbench import settings
from pflbench.core import description, registry
from pflbench.errors import UsageError

METHODS = sorted(registry.algorithms())


def field_of(made) -> tuple:
    return made.default, dict(made.metadata)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_read_from_a_file_is_what_its_import_gives(name):
    module = f"pflbench.algorithms.{name.replace('-', '_')}"
    read = description.read(module, name)
    cls = registry.algorithm(name)
    assert read.text == sys.modules[module].__doc__.strip()
    imported = settings.fields(cls)
    assert list(read.hyperparameters) == list(imported)
    for key, made in imported.items():
        assert field_of(read.hyperparameters[key]) == field_of(made)


def test_neither_descriptions_nor_titles_import_torch_or_a_method():
    code = (
        "import json, sys\nfrom pflbench.core import registry\n"
        "found = {n: [registry.title(n), list(registry.describe(n).hyperparameters)] for n in registry.algorithms()}\n"
        "assert not [m for m in sys.modules if m == 'torch' or m.startswith('pflbench.algorithms.')]\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == list(registry.algorithms())
    titles = {name: title for name, (title, _) in found.items()}
    assert {name: titles[name] for name in ("fedas", "per-fedavg", "fedavg-ft", "lg-fedavg", "fedrod", "pfedme")} == {
        "fedas": "FedAS", "per-fedavg": "Per-FedAvg", "fedavg-ft": "FedAvg-FT", "lg-fedavg": "LG-FedAvg",
        "fedrod": "Fed-RoD", "pfedme": "pFedMe",
    }  # fmt: skip
    assert all(len(title.split()) == 1 and title.lower().replace("-", "") == name.replace("-", "")
               for name, title in titles.items())  # fmt: skip
    assert found["fedbabu"][1] == ["ft_epochs", "ft_part"]


def test_the_title_of_a_method_that_is_not_installed_is_its_name():
    assert registry.title("fedforgotten") == "fedforgotten"


def test_the_title_is_what_stands_before_the_first_colon():
    assert description.title("Fed X 2: does") == "Fed X 2"
    assert description.title("Does something: namely\n") == "Does something"
    assert description.title("A method that has no name: none") is None
    assert description.title("FedX(mu: float = 1.0)") is None
    assert description.title("") is None


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write modules of a package `mine`, which fail when they are imported."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")

    def write(**files: str) -> None:
        for name, text in files.items():
            (tmp_path / "mine" / f"{name}.py").write_text(text + "\nraise AssertionError('imported')\n")

    yield write
    sys.modules.pop("mine", None)


ROOT = "from pflbench.core import Algorithm, register, setting\nfrom typing import ClassVar\n"


def test_fields_of_the_class_itself_are_read_in_the_order_of_the_dataclass(package):
    package(
        a=f'"""A: a."""\n{ROOT}\n@register("a")\nclass A(Algorithm):\n    kind: ClassVar[str] = "x"\n'
        '    one: float = setting(1.0, "first", ge=0)\n    two: int | None = setting(None, "second")\n',
        b='"""B: b."""\nfrom .a import A as First\nfrom pflbench import register, setting\n\n'
        '@register("b")\nclass B(First):\n    """No docstring of the method."""\n'
        '    three: str = setting("x", "third", choices=("x", "y"))\n',
        c='"""C: c."""\nfrom mine.a import A\nfrom pflbench import register, setting\n\n'
        '@register("c")\nclass C(A):\n    one: float = setting(-3.0, "mine", gt=-5)\n'
        '    four: bool = setting(False, "fourth")\n',
        d='"""D: d."""\nfrom .b import B\nfrom .c import C\n\nclass Between(B, C):\n    two: int = 5\n\n'
        '@register("d")\nclass D(Between):\n    pass\n',
    )
    found = {name: description.read(f"mine.{name}", name) for name in "abcd"}
    assert {name: list(read.hyperparameters) for name, read in found.items()} == {
        "a": ["one", "two"], "b": ["one", "two", "three"], "c": ["one", "two", "four"], "d": ["one", "four", "three"],
    }  # fmt: skip
    # A dataclass takes all fields of B after those of C, the inherited ones included.
    assert [found[name].hyperparameters["one"].default for name in "abcd"] == [1.0, 1.0, -3.0, 1.0]
    assert found["b"].hyperparameters["three"].metadata["choices"] == ("x", "y")
    assert settings.bounds(found["c"].hyperparameters["one"]) == "> -5"
    assert found["b"].text == "B: b."


@pytest.mark.parametrize(
    "text",
    [
        '@register("x")\nclass X(Algorithm):\n    one: float = setting(DEFAULT, "computed")',
        '@register("x")\nclass X(Algorithm):\n    one: float = setting(1.0, "doc", **BOUNDS)',
        '@register("x")\nclass X(Algorithm):\n    one: float = setting(1.0, "doc", gee=0)',
        '@register("x")\nclass X(Algorithm):\n    one: float = hyper(1.0, "doc")',
        '@register(NAME)\nclass X(Algorithm):\n    one: float = setting(1.0, "doc")',
        '@register("y")\nclass X(Algorithm):\n    one: float = setting(1.0, "doc")',
        '@register("x")\nclass X(make_base()):\n    one: float = setting(1.0, "doc")',
        '@register("x")\nclass X(Unknown):\n    one: float = setting(1.0, "doc")',
        'from .nowhere import Base\n@register("x")\nclass X(Base):\n    one: float = setting(1.0, "doc")',
        'from . import Base\n@register("x")\nclass X(Base):\n    one: float = setting(1.0, "doc")',
        'class X(Algorithm: pass',
    ],
)  # fmt: skip
def test_what_the_text_does_not_tell_is_not_guessed(package, text):
    package(x=f'"""X: x."""\n{ROOT}\n{text}\n')
    with pytest.raises(description.UnreadableError):
        description.read("mine.x", "x")


def test_a_method_without_a_file_is_described_by_its_class(methods):
    from pflbench import Algorithm, register

    @register("prompted")
    class Prompted(Algorithm):
        """Typed in."""

    assert registry.describe("prompted").text == "Typed in."
    assert dict(registry.describe("prompted").hyperparameters) == {}
    assert registry.title("prompted") == "prompted"


def test_an_unknown_method_is_one_line_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"unknown algorithm 'fedsa'; did you mean 'fedas'\?"):
        registry.describe("fedsa")
