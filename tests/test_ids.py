"""The id of a run does not change: every later version finds the records of cc204e1."""

import dataclasses
import json
from pathlib import Path

import pytest

import pflbench
from pflbench import spec
from pflbench.algorithms.fedavg import FedAvg

KNOWN = json.loads((Path(__file__).parent / "data" / "ids.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known["id"])
def test_the_id_is_that_of_cc204e1(known):
    assert pflbench.prepare(pflbench.RunSpec(**known["spec"])).id == known["id"]


def test_a_resolved_spec_has_the_id_that_it_was_resolved_from():
    for known in KNOWN:
        experiment = pflbench.prepare(pflbench.RunSpec(**known["spec"]))
        assert pflbench.prepare(experiment.spec).id == experiment.id


def _id(hyperparameters, **settings):
    spec = pflbench.RunSpec(algo="growing", dataset="synthetic10", hyperparameters=hyperparameters, **settings)
    return pflbench.prepare(spec).id


def test_a_hyperparameter_that_was_added_later_is_in_the_id_only_where_it_is_not_its_default(methods):
    def register(**later):
        @pflbench.register("growing")
        class Growing(FedAvg):
            mu: float = pflbench.setting(1.0, "there from the first")
            if later:
                nu: float = pflbench.setting(0.5, "came later", **later)

        return Growing

    register()
    before, other = _id({}), _id({"mu": 2.0})
    register(later=True)
    assert (_id({}), _id({"nu": 0.5}), _id({"nu": "0.5"}), _id({"mu": 2.0})) == (before, before, before, other)
    assert len({before, other, _id({"nu": 0.25}), _id({"mu": 2.0, "nu": 0.25})}) == 4
    register(later=False)
    assert _id({}) != before
    experiment = pflbench.prepare(pflbench.RunSpec(algo="growing", dataset="synthetic10"))
    assert experiment.spec.hyperparameters == {"mu": 1.0, "nu": 0.5}  # the record has it


def test_a_setting_of_a_run_that_was_added_later_is_in_the_id_only_where_it_is_not_its_default(methods, monkeypatch):
    pflbench.register("growing")(type("Growing", (FedAvg,), {}))
    before = _id({})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Longer(spec.RunSpec):
        tier: int = pflbench.setting(3, "came later", later=True)

    monkeypatch.setattr(pflbench, "RunSpec", Longer, raising=False)
    assert _id({}) == _id({}, tier=3) == before
    assert len({before, _id({}, tier=4), _id({}, tier=5)}) == 3
