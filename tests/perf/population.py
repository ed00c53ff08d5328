"""A run with many clients, as a script: prints the seconds of its rounds without evaluation, and the most memory used.

python population.py ALGO CLIENTS PARTICIPANTS ROUNDS OUT
"""

import itertools
import json
import os
import sys
import threading
import time
from pathlib import Path

import workload

import pflbench


def memory():
    """Return the bytes that this process and its children hold; what they share counts once (PSS)."""
    found = 0
    for pid in [os.getpid(), *map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())]:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            found += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        except OSError:  # it has just ended
            pass
    return found


def main(algo, clients, participants, rounds, out):
    federation = workload.federation(6 * clients, clients)
    most = 0
    ended = threading.Event()

    def watch():
        nonlocal most
        while not ended.wait(0.1):
            most = max(most, memory())

    times = []
    spec = pflbench.RunSpec(
        algo=algo, clients=clients, join_ratio=participants / clients, rounds=rounds, local_epochs=1, batch_size=10,
        eval_every=rounds, min_samples=4,
    )  # fmt: skip
    watcher = threading.Thread(target=watch)

    class Watch(pflbench.Observer):
        """Notes the time when the workers were forked, and after each round and the evaluation, which is the last."""

        def start(self, experiment):
            watcher.start()
            times.append(time.perf_counter())

        def round(self, row):
            times.append(time.perf_counter())

        def evaluation(self, row):
            times.append(time.perf_counter())

    pflbench.run(spec, federation, workers=2, out=out, observers=[Watch()])
    ended.set()
    watcher.join()
    print(
        json.dumps(
            {
                "rounds": [b - a for a, b in itertools.pairwise(times[1:-1])],
                "evaluation": times[-1] - times[-2],
                "memory": most,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5])
