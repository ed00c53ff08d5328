"""How long a round of 10,000 participants takes on 64 nodes: the tables of docs/scale.md.

`python tests/perf/scale.py` prints them from the measurements in scale.json. With `--measure` it first measures this
machine and computes real rounds, three times; it keeps the shortest times, and replaces that file. This takes minutes.
"""

import argparse
import functools
import itertools
import json
import statistics
from pathlib import Path

from simulation import Cluster, Costs, Outcome, Part, Plan, Wire, plan_round, simulate, sizes

MEASURED = Path(__file__).with_name("scale.json")
NAMES = {"fedavg": "FedAvg", "fedper": "FedPer", "fedas": "FedAS", "scaffold": "SCAFFOLD"}
PARTICIPANTS, MEAN, NODES = 10_000, 300, 64
GBIT = 1e9 / 8
PASSES = 3  # of measuring
DISK = 2e9  # bytes a second: assumed, an NVMe disk
RAY = Wire(0.23e-3, 0.4e-9)  # measured by hand with Ray 2.60.0: CPU of the driver, one actor on the same machine


def rounded(value: object) -> object:
    """Return a tree with three digits of each float."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def told(case: dict, measured: dict) -> float:
    """Return the seconds that the simulation gives for a real round."""
    costs, wire = costs_of(measured["one_epoch"][case["algo"]]), Wire(**measured["pipe"])
    plan = Plan(shared="all" if case["executor"] == "processes" else "", epochs=1)
    cluster = Cluster(nodes=1, cores=case["workers"])
    return simulate(plan_round(costs, case["train"], plan, wire, cluster.nodes), cluster).seconds


def costs_of(found: dict) -> Costs:
    parts = {name: Part(**value) if isinstance(value, dict) else value for name, value in found.items()}
    return Costs(**parts)


@functools.cache
def participants() -> list[int]:
    return sizes(PARTICIPANTS, MEAN)


def outcome(
    measured: dict, algo: str, plan: Plan, *, nodes: int = NODES, cores: int = 16, gbit: int = 10, **cluster: int
) -> Outcome:
    """Simulate a round of a method on CIFAR-10-sized images."""
    found = plan_round(costs_of(measured["costs"]["10"][algo]), participants(), plan, RAY, nodes)
    return simulate(found, Cluster(nodes, cores, gbit * GBIT, DISK, **cluster))


def markdown(head: str, rows: list[list[str]]) -> str:
    """Return a table; the titles of its columns are separated by bars."""
    lines = [head.split("|"), ["---"] * len(rows[0]), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def of_costs(measured: dict) -> str:
    """Return what is sent and stored for a participant, and what it costs the driver and an actor."""
    rows = []
    for classes, algo in itertools.product(measured["costs"], NAMES):
        costs = costs_of(measured["costs"][classes][algo])
        found = plan_round(costs, participants(), Plan(), RAY, NODES)
        actor = statistics.fmean(job.compute for job in found.jobs)
        send, receive = found.jobs[0].send, found.jobs[0].receive
        driver = send + receive + (found.before + found.after) / PARTICIPANTS
        megabytes = [f"{part.nbytes / 1e6:.2f}" for part in (costs.broadcast, costs.state, costs.upload)]
        milliseconds = [f"{1e3 * x:.1f}" for x in (costs.step, send, receive, costs.add, driver)]
        rows.append([f"{NAMES[algo]}, {classes}", *megabytes, f"{actor:.2f}", *milliseconds, f"{actor / driver:.0f}"])
    return markdown(
        "method, classes|broadcast, MB|state, MB|upload, MB|job, s|step, ms|send, ms|receive, ms|add, ms|driver, ms"
        "|actors it can feed",
        rows,
    )


def of_networks(measured: dict) -> str:
    """Return the seconds of a round as it is, by cores of a node and by network, and what is busy."""
    rows = []
    for algo in NAMES:
        found = [outcome(measured, algo, Plan(), cores=c, gbit=g) for c in (8, 16) for g in (10, 25, 100)]
        shown = found[3]
        shares = [f"{100 * x:.0f}" for x in (shown.actors, shown.driver, shown.network, shown.disk)]
        rows.append([NAMES[algo], *(f"{each.seconds:.0f}" for each in found), *shares, shown.limit])
    return markdown(
        "method|8 cores, 10 Gbit/s|8, 25|8, 100|16 cores, 10 Gbit/s|16, 25|16, 100|actors, %|driver, %|network, %"
        "|disk, %|limit",
        rows,
    )


def of_nodes(measured: dict) -> str:
    """Return the seconds of a round as it is, by number of nodes."""
    numbers = (1, 4, 16, 64)
    rows = [[NAMES[a], *(f"{outcome(measured, a, Plan(), nodes=n).seconds:.0f}" for n in numbers)] for a in NAMES]
    return markdown("|".join(["method", "1 node", *map(str, numbers[1:])]), rows)


LIFTS: dict[str, tuple[Plan, dict[str, int]]] = {
    "none": (Plan(), {}),
    "two jobs in flight an actor": (Plan(), {"in_flight": 2}),
    "the driver sends and receives on 4 threads": (Plan(), {"threads": 4}),
    "four times the local epochs": (Plan(epochs=20), {}),
    "actors keep states in a shared folder": (Plan(shared="states"), {}),
    "actors keep states and uploads there": (Plan(shared="all"), {}),
    "each node sums its uploads": (Plan(sums=True), {}),
    "states in a shared folder, and sums": (Plan(shared="states", sums=True), {}),
    "the same, two jobs in flight an actor": (Plan(shared="states", sums=True), {"in_flight": 2}),
    "none; 10,000 clients are evaluated, too": (Plan(evaluated=10_000), {}),
}


def of_lifts(measured: dict) -> str:
    """Return the seconds of a round with each lift, its limit, and the share of the time that actors compute."""
    rows = []
    for name, (plan, cluster) in LIFTS.items():
        found = [outcome(measured, algo, plan, **cluster) for algo in NAMES]
        rows.append([name, *(f"{each.seconds:.0f} s, {each.limit}, {100 * each.actors:.0f} %" for each in found)])
    return markdown("|".join(["lift", *NAMES.values()]), rows)


def idle_seconds(case: dict) -> float:
    """Return what a real round takes on an idle machine: driver and worker take turns if there is one worker."""
    return case["cpu"] if case["workers"] == 1 else case["seconds"]


def of_rounds(measured: dict) -> str:
    """Return real rounds beside what the simulation gives for them."""
    rows = []
    for case in measured["rounds"]:
        train, seconds, real = case["train"], told(case, measured), idle_seconds(case)
        clients = f"{len(train)} of {min(train)} to {max(train)}"
        who = [NAMES[case["algo"]], clients, case["executor"], str(case["workers"])]
        clocks = [f"{case[clock]:.2f}" for clock in ("seconds", "cpu")]
        rows.append([*who, *clocks, f"{seconds:.2f}", f"{seconds / real:.2f}"])
    return markdown("method|clients, their samples|executor|workers|real, s|CPU, s|simulated, s|factor", rows)


TABLES = (of_costs, of_networks, of_nodes, of_lifts, of_rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure this machine first")
    if parser.parse_args().measure:
        from costs import least, measure_all

        found = functools.reduce(least, (measure_all(list(NAMES)) for _ in range(PASSES)))
        MEASURED.write_text(json.dumps(rounded(found), indent=1) + "\n", encoding="utf-8")
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    print("\n".join(table(measured) for table in TABLES), end="")


if __name__ == "__main__":
    main()
