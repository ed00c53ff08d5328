"""The simulation of docs/scale.md: it gives what can be worked out by hand, and the page shows its tables."""

import json
from pathlib import Path

import pytest
import scale
from simulation import Cluster, Costs, Job, Part, Plan, Round, Wire, plan_round, simulate, sizes

ROOT = Path(__file__).parents[1]
WORK = [5.0, 3.0, 3.0, 2.0, 2.0, 1.0]
FREE = Wire(0.0, 0.0)


def jobs(**other):
    return Round([Job(seconds, **other) for seconds in WORK])


def test_one_actor_takes_the_sum_of_the_work():
    found = simulate(jobs(), Cluster(1, 1))
    assert found.seconds == sum(WORK)
    assert found.actors == 1.0
    assert found.limit == "actors"


@pytest.mark.parametrize(("nodes", "cores"), [(2, 1), (1, 2)])
def test_without_other_costs_actors_take_the_largest_job_that_waits(nodes, cores):
    # By hand: 5 + 2 + 1 and 3 + 3 + 2.
    assert simulate(jobs(), Cluster(nodes, cores)).seconds == 8.0


def test_the_longest_job_bounds_the_round():
    found = simulate(jobs(), Cluster(3, 2))
    assert found.seconds == 5.0
    assert found.limit == "actors"


def test_a_slow_network_takes_bytes_over_bandwidth():
    found = simulate(Round([Job(0.0, up=30.0)] * 100), Cluster(4, 4, network=10.0))
    assert found.seconds == pytest.approx(300.0)
    assert found.network == pytest.approx(1.0)
    assert found.limit == "network"


def test_both_directions_of_the_network_work_at_once():
    found = simulate(Round([Job(0.0, down=30.0, up=30.0)] * 100), Cluster(4, 4, network=10.0))
    assert found.seconds == pytest.approx(303.0)  # the first job's way down, then all ways up


def test_the_driver_handles_one_message_after_the_other():
    found = simulate(Round([Job(0.0, send=1.0, receive=2.0)] * 20, before=4.0, after=6.0), Cluster(8, 8))
    assert found.seconds == pytest.approx(4 + 20 * 3 + 6)
    assert found.driver == pytest.approx(1.0)
    assert found.limit == "driver"


def test_threads_share_what_the_driver_sends_and_receives_but_not_the_sum():
    found = simulate(Round([Job(0.0, send=1.0, receive=2.0)] * 20, before=4.0, after=6.0), Cluster(8, 8, threads=4))
    assert found.seconds == pytest.approx(4 + 20 * 3 / 4 + 6)
    assert found.driver == pytest.approx(1.0)


def test_a_slow_disk_delays_the_next_round():
    found = simulate(Round([Job(1.0, written=10.0)] * 8), Cluster(2, 2, disk=4.0))
    assert found.seconds == pytest.approx(1 + 8 * 10 / 4)
    assert found.limit == "disk"


def test_the_broadcast_reaches_each_node_once_and_each_actor_unpacks_it():
    found = simulate(Round([Job(1.0)] * 4, broadcast=20.0, unpack=0.5), Cluster(2, 2, network=10.0))
    assert found.seconds == pytest.approx(2 * 2 + 0.5 + 1)
    assert found.network == pytest.approx(4 / 5.5)
    assert found.actors == pytest.approx(1.5 / 5.5)


def test_a_second_job_in_flight_hides_the_way():
    way = {"down": 10.0, "up": 10.0}
    one, two = (simulate(jobs(**way), Cluster(1, 1, network=10.0, in_flight=n)).seconds for n in (1, 2))
    assert one == sum(WORK) + 2 * len(WORK)
    assert two == sum(WORK) + 2


@pytest.fixture
def costs():
    upload = Part(100, pickle=0.1, unpickle=0.2, write=0.3, fetch=0.4)
    state = Part(1000, pickle=1.0, unpickle=2.0, write=3.0, fetch=4.0)
    return Costs(
        broadcast=upload, state=state, upload=upload, prepare=0.01, add=10.0, checkpoint=0.001, fixed=20.0, step=1.0,
        test=30.0, sample=0.5,
    )  # fmt: skip


def test_the_driver_moves_states_and_uploads(costs):
    found = plan_round(costs, [16, 17], Plan(epochs=1), Wire(100.0, 1.0), 2)
    first, second = found.jobs
    assert first.compute == pytest.approx(20 + 2 + 2.0 + 1.0 + 0.1)  # of 17 samples: two steps; the largest comes first
    assert second.compute == pytest.approx(first.compute - 1)
    assert first.send == pytest.approx(100 + 4.0 + 1000)
    assert first.receive == pytest.approx(100 + 1100 + 2.0 + 3.0 + 0.2 + 0.3)
    assert (first.down, first.up, first.written) == (1000, 1100, 1100)
    assert found.before == pytest.approx(2 * 0.01 + 0.1)
    assert found.after == pytest.approx(2 * (10 + 0.001))
    assert found.fetched == 0


def test_a_shared_folder_takes_states_from_the_driver(costs):
    job = plan_round(costs, [16], Plan(shared="states", epochs=1), FREE, 2).jobs[0]
    assert (job.send, job.receive) == (0, pytest.approx(0.2 + 0.3))
    assert (job.down, job.up, job.written) == (0, 100, 100)
    assert job.compute == pytest.approx(20 + 1 + 4.0 + 3.0 + 0.1)


def test_uploads_in_a_shared_folder_are_read_at_the_end(costs):
    found = plan_round(costs, [16, 16], Plan(shared="all", epochs=1), FREE, 2)
    assert (found.jobs[0].receive, found.jobs[0].up, found.jobs[0].written) == (0, 0, 0)
    assert (found.fetched, found.after) == (200, pytest.approx(2 * (10 + 0.001)))


def test_sums_cost_what_nodes_send_not_what_clients_send(costs):
    few, many = (plan_round(costs, [16] * n, Plan(sums=True, epochs=1), FREE, 3) for n in (10, 20))
    assert few.fetched == many.fetched == 3 * 2 * 100
    assert many.after - few.after == pytest.approx(10 * 0.001)
    assert many.jobs[0].up == 1000  # the state alone


def test_clients_are_evaluated_beside_the_training(costs):
    found = plan_round(costs, [31], Plan(epochs=1, evaluated=2), FREE, 1)
    train, first, second = found.jobs
    assert train.compute == pytest.approx(20 + 2 + 3.1)
    assert first == second == Job(compute=30 + 11 * 0.5 + 2.0, send=4.0, receive=0.0, down=1000)


def test_sizes_are_uneven_and_always_the_same():
    found = sizes(10_000, 300)
    assert found == sizes(10_000, 300)
    assert min(found) == 30
    assert sum(found) / len(found) == pytest.approx(300, rel=0.02)
    assert max(found) > 5 * 300


@pytest.fixture(scope="module")
def measured():
    return json.loads(scale.MEASURED.read_text(encoding="utf-8"))


@pytest.mark.parametrize("table", scale.TABLES)
def test_the_page_shows_the_tables(measured, table):
    assert table(measured) in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_simulated_rounds_take_what_real_rounds_with_one_worker_take(measured):
    cases = [case for case in measured["rounds"] if case["workers"] == 1]
    factors = [scale.told(case, measured) / scale.idle_seconds(case) for case in cases]
    assert len(factors) >= 5
    assert all(1 / 1.3 < factor < 1.3 for factor in factors), factors
