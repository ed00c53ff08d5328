"""Time and memory against the number of clients: a round must cost what its participants cost."""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "population.py"
CASES = [
    *(("fedper", clients, 10, 8) for clients in (20, 100, 1_000, 10_000)),
    *(("fedas", clients, 10, 8) for clients in (20, 100, 1_000)),
    ("fedas", 1_000, 100, 25),  # most clients have taken part, and keep their model
    ("fedas", 1_000, 1_000, 2),
]
BOUND = 3e9  # bytes of all processes


@pytest.mark.parametrize(("algo", "clients", "participants", "rounds"), CASES)
def test_population(algo, clients, participants, rounds, benchmark, say, tmp_path):
    benchmark.group = f"{algo} with more and more clients"
    command = [sys.executable, str(SCRIPT), algo, *map(str, (clients, participants, rounds)), str(tmp_path)]
    found = []

    def run():
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))

    benchmark.pedantic(run, rounds=1)
    (result,) = found
    benchmark.extra_info.update(result)
    gigabytes = result["memory"] / 1e9
    each = f"{statistics.median(result['rounds']):.3f} s a round, " if result["rounds"] else ""
    say(
        f"{algo}, {clients:6} clients, {participants:4} a round: {each}{result['evaluation']:.1f} s "
        f"for the evaluation of all clients; {gigabytes:.2f} GB at most"
    )
    shutil.rmtree(tmp_path)
    assert result["memory"] < BOUND
