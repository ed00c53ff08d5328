"""A round through Ray, in turn with a round of `processes`."""

import statistics

import pytest

import pflbench

pytest.importorskip("ray")


@pytest.mark.parametrize("algo", ["fedavg", "fedas"])
def test_executors(algo, federation, request, tmp_path, say):
    spec = pflbench.RunSpec(
        algo=algo, clients=len(federation.clients), local_epochs=1, batch_size=10, join_ratio=1.0, rounds=5
    )
    times = {"processes": [], "ray": []}
    for pair in range(request.config.getoption("--pairs")):
        for executor, found in times.items():
            out = tmp_path / f"{executor}{pair}"
            record = pflbench.run(spec, federation, executor=executor, workers=2, out=out)
            found += [
                row["seconds"] + test["seconds"] for row, test in zip(record.rounds, record.evaluations, strict=False)
            ][1:-1]
    here, there = (statistics.median(found) for found in times.values())
    sizes = ", ".join(f"{name} {min(found):.2f}-{max(found):.2f}" for name, found in times.items())
    say(f"{algo:10} {there:.2f} s a round through ray, {here:.2f} s by processes: {there / here:.2f} times ({sizes})")
