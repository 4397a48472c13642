"""The engine against closed forms, the cost model, and conservation; no timing of this machine enters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmark.simulate.engine import Simulation, SimulationSettings
from benchmark.simulate.gap import step_parts
from benchmark.simulate.variants import Deployment, RoundRobin, simulate
from benchmark.simulate.workloads import Workload, chat
from sglang_dcp.policy.cost_model import CostModel, InstanceWork, load_cost_model
from sglang_dcp.policy.placement import make_policy
from sglang_dcp.policy.types import CapacityError, InstanceLoad, Placement, PlacementRequest


def policy_of(name: str, cost: CostModel, count: int, page: int = 16):
    return make_policy(name, num_instances=count, page_size=page, cost_model=cost, degree=None, max_degree=count, max_guest_fraction=1.0)


def constant_step(seconds: float) -> CostModel:
    """A cost model whose step always lasts `seconds`."""
    base = load_cost_model("cpu", 1)
    zero = {name: 0.0 for name in base.__dataclass_fields__ if "_us" in name}
    return replace(base, **{**zero, "step_fixed_us": seconds * 1e6})


def small(count: int, pool: int = 1024, **changes) -> SimulationSettings:
    options = {"num_instances": count, "pool_tokens": pool, "page_size": 16, "max_new_tokens": 64, "max_degree": count, **changes}
    return SimulationSettings(**options)


def test_one_request_alone_takes_its_tokens_times_the_step():
    cost = load_cost_model("cpu", 1)
    result = Simulation([(0.0, 100, 20)], policy_of("local", cost, 1), cost, small(1)).run()
    steps = [cost.step_us([InstanceWork(100 + k, 1, 1)]) * 1e-6 for k in range(20)]
    assert result.duration_s == pytest.approx(sum(steps))
    assert result.p99_tpot_ms == pytest.approx(1e3 * sum(steps) / 20)


def test_m_d_1_waiting_time():
    """One server, one request at a time, service of exactly four steps: mean wait = rho / (2 (1 - rho)) services."""
    rate, service = 5.0, 0.1
    arrivals = np.cumsum(np.random.default_rng(1).exponential(1 / rate, 8_000))
    cost = constant_step(service / 4)
    simulation = Simulation(
        [(float(t), 8, 4) for t in arrivals], policy_of("local", cost, 1), cost, small(1, max_running=1, overload_fraction=1.0)
    )
    simulation.run()
    wait = np.mean([request.admitted - request.arrival for request in simulation.requests])
    rho = rate * service
    # An arrival during a step is seen when the step ends; a service is four steps, an idle server starts at once.
    assert wait == pytest.approx(service * rho / (2 * (1 - rho)), rel=0.08)


def test_without_contention_the_latency_is_the_service_time():
    cost = constant_step(0.01)
    requests = [(float(i), 50, 30) for i in range(200)]
    simulation = Simulation(requests, policy_of("local", cost, 4), cost, small(4))
    result = simulation.run()
    assert all(request.finish - request.arrival == pytest.approx(0.3) for request in simulation.requests)
    assert result.num_finished == 200 and result.num_retractions == 0


@pytest.mark.parametrize("policy", ["dual-balance", "length-buckets", "local"])
@pytest.mark.parametrize("prefill", ["elsewhere", "same"])
def test_pages_and_tokens_are_conserved_under_shortage(policy: str, prefill: str):
    """Small pools, long outputs: growth, stalls and retractions occur, and after every step all books agree."""
    generator = np.random.default_rng(4)
    prompts = generator.integers(10, 700, 150)
    outputs = generator.integers(5, 60, 150)
    arrivals = np.cumsum(generator.exponential(0.03, 150))
    cost = load_cost_model("cpu", 4)
    grows = policy == "dual-balance"
    settings = small(4, grows=grows, prefill=prefill, overload_fraction=1.0)
    requests = list(zip(arrivals.tolist(), prompts.tolist(), outputs.tolist(), strict=True))

    simulation = Simulation(requests, policy_of(policy, cost, 4), cost, settings, step_hook=check_books)
    result = simulation.run()
    assert result.num_finished == 150 and result.num_rejected == 0
    assert all(request.decoded == request.output for request in simulation.requests)
    cluster = simulation.cluster
    assert cluster.free_pages == [64] * 4 and not any(load.kv_tokens for load in cluster.loads)
    assert not cluster.kv_tokens.any() and not cluster.batch.any() and not cluster.routed.any() and not cluster.rows.any()


def test_moved_pages_are_conserved_and_level_the_instances():
    """Two instances of a node: one starts with everything. Books agree after every step, and the copies lengthen the steps."""
    cost = load_cost_model("deepseek-v3.h200", 4)
    requests = [(0.0, 12_000, 80), (0.001, 5_000, 90), (0.002, 300, 100)]

    class AllOnOne:
        name = "all-on-one"

        def place(self, request, loads, page_size):
            return Placement(0, (0,), (request.prompt_tokens,))

    def run(moves: bool) -> Simulation:
        settings = small(4, pool=32_000, moves=moves, instances_per_node=2)
        simulation = Simulation(requests, AllOnOne(), cost, settings, step_hook=lambda s: check_books(s, 2_000))
        simulation.result = simulation.run()
        return simulation

    stays, moves = run(False), run(True)
    assert stays.recorder.num_moved_tokens == 0 < moves.recorder.num_moved_tokens
    assert moves.recorder.num_moved_tokens % 16 == 0
    assert [request.decoded for request in moves.requests] == [80, 90, 100]
    assert moves.result.kv_balance < stays.result.kv_balance
    assert [request.end_degree for request in moves.requests][0] == 2
    assert moves.cluster.free_pages == [2_000] * 4 and not moves.cluster.routed.any() and not moves.cluster.rows.any()


def test_who_waits_behind_whom():
    """Instance 0 is full and a large request waits for it: a small one behind it waits by `home`, one at another home by `global` only."""

    class Scripted:
        name = "scripted"

        def place(self, request, loads, page_size):
            home = 1 if request.prompt_tokens == 20 else 0
            return Placement(home, (home,), (request.prompt_tokens,))

    def waits(rule: str) -> list[bool]:
        requests = [(0.0, 600, 50), (0.001, 900, 5), (0.002, 30, 5), (0.003, 20, 5)]
        simulation = Simulation(requests, Scripted(), constant_step(0.01), small(2, admission=rule, overload_fraction=1.0))
        simulation.run()
        return [request.wait > 0.2 for request in simulation.requests]

    assert waits("home") == [False, True, True, False]
    assert waits("global") == [False, True, True, True]
    assert waits("any") == [False, True, False, False]


def check_books(simulation: Simulation, pool_pages: int = 64) -> None:
    """Every page has one owner, no shard holds more tokens than pages, running sums equal a recount."""
    cluster, step = simulation.cluster, simulation.step
    held, tokens, batch = [0] * 4, [0.0] * 4, [0] * 4
    for rank in range(4):
        for request in cluster.residents[rank].values():
            running = request.finish_step >= 0
            gained = step - request.tail_since if running and request.tail == rank else 0
            held[rank] += request.pages[rank]
            tokens[rank] += request.tokens[rank] + gained
            batch[rank] += running and request.home == rank
            assert request.tokens[rank] + gained <= request.pages[rank] * 16
    assert [pool_pages - pages for pages in held] == cluster.free_pages
    assert min(cluster.free_pages) >= 0
    assert tokens == cluster.kv_tokens.tolist()
    assert batch == cluster.batch.tolist()


def test_step_time_equals_the_cost_model():
    """The array form used in the loop against CostModel.step_us, with routed and remote rows."""
    cost = load_cost_model("deepseek-v3.h200", 4)
    seen = []

    class Scripted:
        name = "scripted"

        def place(self, request, loads, page_size):
            home = request.prompt_tokens % 4
            return Placement(home, ((home + 1) % 4, home), (160, request.prompt_tokens - 160))

    def compare(simulation: Simulation) -> None:
        cluster = simulation.cluster
        work = [
            InstanceWork(
                kv_tokens=int(cluster.kv_tokens[i]),
                attention_rows=int(cluster.rows[i]),
                home_requests=int(cluster.batch[i]),
                routed_out=int(cluster.routed[0, i]),
                routed_in=int(cluster.routed[1, i]),
                remote_out=int(cluster.routed[2, i]),
                remote_in=int(cluster.routed[3, i]),
            )
            for i in range(4)
        ]
        assert simulation._step_seconds() == pytest.approx(cost.step_us(work) * 1e-6)
        seen.append(sum(item.remote_out for item in work))

    requests = [(0.01 * i, 400 + i, 30) for i in range(8)]
    Simulation(requests, Scripted(), cost, small(4, pool=100_000, instances_per_node=2), step_hook=compare).run()
    assert max(seen) > 0


def test_equal_seeds_give_equal_runs_and_other_seeds_do_not():
    workload, deployment = chat(0.01), Deployment(num_instances=8, pool_tokens=1_100_000)
    runs = [simulate("dual-balance", deployment, workload, workload.requests(10.0, 20.0, seed), max_running=64) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_no_policy_sees_output_lengths():
    """Outputs are shuffled; placements made before anything has finished must not change."""
    workload, cost = chat(0.05), load_cost_model("deepseek-v3.h200", 8)
    requests = workload.requests(40.0, 5.0, 3)
    outputs = np.random.default_rng(0).permutation([row[2] + 200 for row in requests]).tolist()
    kept = [(t, prompt, output + 200) for t, prompt, output in requests]
    shuffled = [(t, prompt, output) for (t, prompt, _), output in zip(requests, outputs, strict=True)]
    placements = []
    for rows in (kept, shuffled):
        simulation = Simulation(
            rows, policy_of("dual-balance", cost, 8, 64), cost, small(8, pool=1_100_000, page_size=64, max_new_tokens=4500)
        )
        simulation.run()
        first_finish = min(request.finish for request in simulation.requests)
        placements.append([request.placement for request in simulation.requests if request.arrival < min(4.0, first_finish)])
    count = min(map(len, placements))
    assert count > 100
    assert placements[0][:count] == placements[1][:count]


def test_nothing_beats_the_oracle_and_a_rejected_request_never_holds_a_rate():
    workload, deployment = chat(0.05), Deployment(num_instances=8, pool_tokens=1_100_000)
    requests = workload.requests(8.0, 60.0, 2)
    oracle = simulate("oracle", deployment, workload, requests).mean_tpot_ms
    for name in ("dual-balance", "length-buckets", "local-least-kv", "fixed-4"):
        assert simulate(name, deployment, workload, requests).mean_tpot_ms >= oracle
    tiny = Deployment(num_instances=8, pool_tokens=60_000)
    assert simulate("local-least-kv", tiny, workload, requests).p99_tpot_ms == float("inf")
    assert simulate("dual-balance", tiny, workload, [row for row in requests if row[1] < 300_000]).num_rejected == 0


def test_the_parts_of_the_gap_add_up_to_the_step_less_a_perfect_one():
    """Two nodes of two; a split of a long prompt, and more requests on one instance than on the others."""
    cost, settings = load_cost_model("deepseek-v3.h200", 4), small(4, pool=500_000, instances_per_node=2)
    script = iter([Placement(0, (1, 0), (40_000, 10_000)), *[Placement(rank, (rank,), (300,)) for rank in (0, 0, 1, 2, 3)]])

    class Scripted:
        name = "scripted"

        def place(self, request, loads, page_size):
            return next(script)

    seen = []

    def look(simulation: Simulation) -> None:
        if simulation.num_running == 6:
            cluster = simulation.cluster
            level = cost.attention_us_per_token * cluster.kv_tokens.mean() + cost.dispatch_us_per_request * cluster.batch.mean()
            layer = cost.constant_layer_us + level + cost.expert_us(6) + cost.combine_us_per_request * cluster.batch.mean()
            perfect = (cost.num_layers * layer + cost.step_fixed_us) / 1e3
            seen.append((sum(step_parts(simulation).values()), 1e3 * simulation._step_seconds() - perfect))

    requests = [(0.0, 50_000, 30), *[(0.0, 300, 30)] * 5]
    Simulation(requests, Scripted(), cost, settings, step_hook=look).run()
    assert len(seen) > 20
    for parts, difference in seen:
        assert parts == pytest.approx(difference) and parts > 1.0


def test_the_oracle_with_exchange_pays_its_fixed_part_in_every_step():
    workload, deployment = chat(0.05), Deployment(num_instances=8, pool_tokens=1_100_000)
    cost, requests = deployment.cost_model(), [(0.0, 5_000, 40)]
    free, paid = (simulate(name, deployment, workload, requests).mean_tpot_ms for name in ("oracle", "oracle-exchange"))
    assert paid - free == pytest.approx(cost.num_layers * cost.exchange_fixed_us / 1e3)


def test_retraction_takes_the_youngest_and_it_still_finishes():
    cost = constant_step(0.01)
    simulation = Simulation([(0.0, 500, 60), (0.001, 480, 60)], policy_of("local", cost, 1), cost, small(1, grows=False))
    result = simulation.run()
    assert [request.retractions for request in simulation.requests] == [0, 1]
    assert result.num_finished == 2


def test_one_that_is_stuck_waits_while_others_run():
    """As served (policy/growth.py): it keeps its pages, and goes on when the other has finished."""
    cost = constant_step(0.01)
    simulation = Simulation([(0.0, 502, 60), (0.001, 491, 20)], policy_of("local", cost, 1), cost, small(1, max_degree=1))
    assert simulation.run().num_finished == 2
    assert [request.retractions for request in simulation.requests] == [0, 0]
    first, second = simulation.requests
    assert second.finish == pytest.approx(0.21) and first.finish > 60 * 0.01 + 0.1


def test_the_youngest_of_those_that_are_stuck_yields_not_of_all():
    cost = constant_step(0.01)
    requests = [(0.0, 340, 100), (0.001, 330, 100), (0.002, 320, 100)]
    simulation = Simulation(requests, policy_of("local", cost, 1), cost, small(1, max_degree=1))
    assert simulation.run().num_finished == 3
    assert [request.retractions > 0 for request in simulation.requests] == [False, True, False]


@pytest.mark.parametrize(
    "limits",
    [{"max_degree": 2}, {"max_guest_fraction": 0.3}, {"instances_per_node": 2}, {"max_guest_fraction": 0.5, "instances_per_node": 2}],
)
def test_a_simulation_keeps_every_limit_of_a_split(limits: dict):
    """Under shortage, in every step: degree, guest pages (but for growth of guests already there), and nodes."""
    generator, cost = np.random.default_rng(5), load_cost_model("cpu", 4)
    columns = np.cumsum(generator.exponential(0.03, 150)), generator.integers(10, 700, 150), generator.integers(5, 60, 150)
    requests = list(zip(*(column.tolist() for column in columns), strict=True))
    settings = small(4, overload_fraction=1.0, **limits)
    options = {"max_degree": settings.max_degree if "max_degree" in limits else 4, "max_guest_fraction": settings.max_guest_fraction}
    policy = make_policy("dual-balance", num_instances=4, page_size=16, cost_model=cost, degree=None, **options)

    def check_limits(simulation: Simulation) -> None:
        bounds = simulation.limits
        for request in simulation.requests:
            pages = sum(request.pages.values())
            assert len(request.pages) <= bounds.max_degree
            assert set(request.pages) <= set(bounds.scope(request.home, pages)), request.pages

    simulation = Simulation(requests, policy, cost, settings, step_hook=check_limits)
    result = simulation.run()
    assert result.num_finished + result.num_rejected == 150 and result.num_finished > 140


def test_guests_wait_for_guest_pages():
    """Half of the other pool is all that guests may have: the second such prompt waits for the first one, though pages are plenty."""
    cost = constant_step(0.01)

    class Split:
        name = "split"

        def place(self, request, loads, page_size):
            return Placement(0, (1, 0), (256, request.prompt_tokens - 256))

    settings = small(2, max_guest_fraction=0.3)
    simulation = Simulation([(0.0, 300, 20), (0.001, 300, 20)], Split(), cost, settings)
    assert simulation.run().num_finished == 2
    assert simulation.requests[1].admitted >= simulation.requests[0].finish


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="prefill"):
        small(2, prefill="nowhere")
    with pytest.raises(ValueError, match="admission"):
        small(2, admission="never")
    with pytest.raises(ValueError, match="pool_tokens"):
        small(2, pool=16)
    workload = Workload("x", lambda *_: [], 1, 1)
    with pytest.raises(ValueError, match="rate"):
        workload.requests(0.0, 1.0, 1)
    with pytest.raises(ValueError, match="expected one of"):
        simulate("best", Deployment(), workload, [])


def test_round_robin_goes_in_turn_past_pools_that_are_too_small():
    policy = RoundRobin()
    loads = [InstanceLoad(rank, 0, 0, 1024 if rank != 1 else 64) for rank in range(3)]
    assert [policy.place(PlacementRequest(100, 10, 10), loads, 16).home for _ in range(4)] == [0, 2, 0, 2]
    assert policy.place(PlacementRequest(30, 10, 10), loads, 16).home == 0
    assert policy.place(PlacementRequest(30, 10, 10), loads, 16).home == 1
    with pytest.raises(CapacityError, match="1024"):
        policy.place(PlacementRequest(2000, 10, 10), loads, 16)
