import pytest

from pflbench import UsageError
from pflbench.reports.compare import compare
from pflbench.reports.frames import load, scores


def test_two_runs_are_compared_in_settings_data_results_and_clients(write, tmp_path):
    one = write(tmp_path, "fedas", level=0.8, hyper={"align_lr": 0.1})
    other = write(tmp_path, "fedper", level=0.5)
    found = compare(one, other)
    assert found.runs == (one.name, other.name)
    assert found.differences["spec.algo"] == ("fedas", "fedper")
    assert found.differences["spec.hyperparameters.align_lr"] == (0.1, None)
    assert "spec.lr" not in found.differences
    assert "The first is better for 10 clients, the second for 0" in found.test
    assert f"p = {2 / 2**10:.3g}, two-sided: significant" in found.test
    values = scores(load(one, other))
    assert found.metrics["accuracy"] == (values[one.name], values[other.name])
    third = write(tmp_path, "fedper", level=0.5, seed=1)
    assert compare(one, third).test.startswith("The two runs differ in partition, so their clients are not pairs")


def test_records_of_schema_1_are_compared_with_each_other_and_with_newer_ones(old, write, tmp_path):
    one, *_, other = sorted(old.iterdir())
    found = compare(one, other)
    assert set(found.differences) >= {"spec.seed", "fingerprints.initial"}
    assert found.metrics["accuracy"] == (scores(load(one))[one.name], scores(load(other))[other.name])
    first = write(tmp_path / "a", seed=1)
    second = write(tmp_path / "b", seed=1, kind=1)
    assert set(compare(first, second).differences) == {"fingerprints.metrics"}


def test_a_damaged_record_is_not_compared(old):
    one, other, *_ = sorted(old.iterdir())
    (other / "rounds.jsonl").write_text("")
    with pytest.raises(UsageError, match="is not one finished run: not a readable record"):
        compare(one, other)


def test_records_with_and_without_own_models_are_compared_at_every_selection(write, tmp_path):
    a, b = write(tmp_path / "a", tested="both"), write(tmp_path / "b", seed=1)
    for selection in ("last", "last5", "best-test"):
        found = compare(a, b, selection).metrics["own_accuracy"]
        assert found[0] > 0
        assert found[1] != found[1]  # NaN
