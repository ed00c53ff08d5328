"""A run keeps its id: what cc204e1 wrote is found again by every later version."""

import json
from pathlib import Path

import pytest

import pflbench

KNOWN = json.loads((Path(__file__).parent / "data" / "ids.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known["id"])
def test_the_id_is_that_of_cc204e1(known):
    assert pflbench.resolve(pflbench.RunSpec(**known["spec"])).id == known["id"]
