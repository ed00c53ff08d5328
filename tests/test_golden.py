"""Every method gives the same results as at cc204e1; tests/golden.py says how these were recorded."""

import json

import golden
import pytest

EXPECTED = json.loads(golden.FILE.read_text(encoding="utf-8"))


def test_every_case_is_in_the_file():
    assert {golden.name(case) for case in golden.cases()} == EXPECTED.keys()
    assert len({case.split()[0] for case in EXPECTED}) == 22  # later methods have no results to compare with


@pytest.mark.parametrize("case", golden.cases(), ids=golden.name)
def test_states_and_metrics_are_those_of_the_file(case):
    found, expected = golden.frozen(case), EXPECTED[golden.name(case)]
    assert found.keys() == expected.keys()
    for owner, values in expected.items():
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        for key, numbers in pairs:
            assert [value is None for value in found[owner][key]] == [value is None for value in numbers]
            close = [pytest.approx(value, rel=1e-9, abs=1e-9) for value in numbers if value is not None]
            assert [value for value in found[owner][key] if value is not None] == close, (owner, key)
        assert len(found[owner]) == len(values)
