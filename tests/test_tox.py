"""tox.ini has a smoke environment for every method."""

import configparser
from pathlib import Path

from pflbench.core import registry


def test_every_method_has_a_smoke_environment() -> None:
    ini = configparser.ConfigParser()
    ini.read(Path(__file__).parents[1] / "tox.ini")
    (section,) = [name for name in ini.sections() if name.startswith("testenv:smoke-")]
    algorithms = {line.split("=")[1].strip() for line in ini[section]["set_env"].splitlines() if "ALGO =" in line}
    factors = section.removeprefix("testenv:smoke-{").split("}")[0].split(",")
    assert algorithms == set(registry.algorithms())
    assert factors == sorted(name.replace("-", "") for name in algorithms)
