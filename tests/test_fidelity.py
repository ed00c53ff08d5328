"""docs/fidelity.md agrees with the code."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIDELITY = runpy.run_path(str(ROOT / "tests" / "fidelity.py"))
METHODS = FIDELITY["methods"]()


def test_the_page_is_current():
    written = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    assert written == FIDELITY["page"](), "run: python tests/fidelity.py > docs/fidelity.md"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_where_it_is_from_what_is_personal_and_what_is_evaluated(name):
    said = FIDELITY["lines"](name)
    assert all(said.get(label) for label in ("Title", "Paper", "Family", "Personal", "Sent", "Evaluated", "Reported"))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_test_of_whole_rounds(name):
    assert any(test.startswith(("two rounds", "three rounds", "four rounds")) for test in FIDELITY["tests"](name))


def test_the_bytes_are_those_of_the_contract_tests():
    assert set(METHODS) <= {case.split()[0] for case in FIDELITY["sent"]()}
    assert FIDELITY["sent"]()["fedas alignment=in-place"] == ("2 * BODY", "BODY")
