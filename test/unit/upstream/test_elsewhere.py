"""A local request that waits for its own pool is served from another one that has room, without a server."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_dcp.upstream.step.elsewhere import OVERTAKEN_STEPS, PATIENCE_STEPS
from testing.protocol.fakes import ModelRequest
from testing.protocol.model import ProtocolModel, random_walk

PAGES, PAGE = 16, 4
SOON = PATIENCE_STEPS + 6
"""An ask and its grant take a few steps more, the prefill one."""


def cluster(num_instances: int = 4, **settings: int) -> ProtocolModel:
    return ProtocolModel(1, num_instances, PAGES, PAGE, chunk_tokens=PAGES * PAGE, **settings)


def arrive_local(model: ProtocolModel, home: int, prompt: int, new: int, *, flexible: bool = True) -> ModelRequest:
    return model.arrive(home, prompt, new, (home,), flexible=flexible)


def fill(model: ProtocolModel, *homes: int) -> list[ModelRequest]:
    """Leaves two pages of each home's pool free, for a hundred steps."""
    reqs = [arrive_local(model, home, (PAGES - 3) * PAGE, 100, flexible=False) for home in homes]
    run(model, 2)
    assert all(req.output_ids for req in reqs)
    return reqs


def run(model: ProtocolModel, steps: int) -> None:
    for _ in range(steps):
        model.step()


def test_it_starts_on_an_instance_with_room_beside_the_one_that_fills_its_pool() -> None:
    model = cluster()
    (filler,) = fill(model, 0)
    for home in (2, 3):
        arrive_local(model, home, 12, 100)
    req = arrive_local(model, 0, 20, 30)
    run(model, PATIENCE_STEPS)
    assert req.dyncp is None or not req.output_ids
    run(model, SOON - PATIENCE_STEPS)
    assert req.output_ids and not filler.finished()
    assert req.dyncp.shards[0] == 1
    assert req.dyncp_placement.home == 0 and req.skip_radix_cache_insert  # type: ignore[attr-defined]


def test_one_at_a_time_per_home_and_all_of_them_in_the_end() -> None:
    model = cluster()
    fillers = fill(model, 0)
    reqs = [arrive_local(model, 0, 20, 30) for _ in range(4)]
    for _ in range(5 * SOON):
        model.step()
        assert sum(not req.dyncp.ready for req in model.homes[0].runtime.queues.waiting.values()) <= 1
        if all(req.output_ids for req in reqs):
            break
    assert all(req.output_ids for req in reqs) and not any(filler.finished() for filler in fillers)
    model.drain(2_000)


def test_two_homes_that_see_the_same_room_both_start_whole() -> None:
    """The second finds it taken, and what is left here and there would do only in pieces."""
    model = cluster()
    fill(model, 0, 1, 2)
    arrive_local(model, 3, 7 * PAGE, 30, flexible=False)
    run(model, 2)
    reqs = [arrive_local(model, home, 24, 10) for home in (0, 1)]
    starts: dict[str, int] = {}
    for _ in range(20 * SOON):
        model.step()
        starts |= {req.rid: req.dyncp.start_degree for req in reqs if req.output_ids and req.dyncp is not None}
    assert list(starts.values()) == [1, 1]
    model.drain(2_000)


def test_sglang_looks_at_its_queue_when_the_pages_are_there() -> None:
    """Whichever batch it goes on with says that it is full."""
    model = cluster()
    fill(model, 0)
    home, req = model.homes[0], arrive_local(model, 0, 20, 30)
    for _ in range(SOON):
        home.running_batch = SimpleNamespace(batch_is_full=home.runtime.queues.asked_elsewhere is not None, reqs=home.running)
        model.step()
    assert req.output_ids


def test_a_short_wait_is_sat_out_at_home() -> None:
    model = cluster()
    arrive_local(model, 0, (PAGES - 3) * PAGE, PATIENCE_STEPS - 2)
    run(model, 2)
    req = arrive_local(model, 0, 20, 30)
    run(model, SOON)
    assert req.output_ids and req.dyncp is None


def test_pins_stay_and_so_does_everything_where_one_pool_is_the_limit() -> None:
    for model, flexible in ((cluster(), False), (cluster(max_degree=1), True)):
        fill(model, 0)
        req = arrive_local(model, 0, 20, 30, flexible=flexible)
        run(model, 3 * SOON)
        assert not req.output_ids and req.dyncp is None


def test_where_no_instance_has_room_it_waits_until_one_has() -> None:
    model = cluster(2)
    for home in (0, 1):
        arrive_local(model, home, 8 * PAGE, 100, flexible=False)
    run(model, 2)
    req = arrive_local(model, 0, 10 * PAGE, 10)
    run(model, SOON)
    assert req.dyncp is None and not req.output_ids
    model.homes[1].abort(model.homes[1].running[0])
    run(model, 6)
    assert req.output_ids and req.dyncp.shards[0] == 1


def test_an_abort_while_it_asks_gives_everything_back() -> None:
    for steps in range(PATIENCE_STEPS, PATIENCE_STEPS + 6):
        model = cluster()
        fill(model, 0)
        req = arrive_local(model, 0, 20, 30)
        run(model, steps)
        model.homes[0].abort(req)
        model.drain(2_000)


@pytest.mark.parametrize("seed", range(3))
def test_random_load(seed: int) -> None:
    """Local requests of all homes may move; the model checks every page's owner."""
    model = ProtocolModel(seed, 4, 8, PAGE)
    moved: set[str] = set()
    for _ in range(600):
        if model.random.random() < 0.15 and sum(len(home.waiting_queue) for home in model.homes) < 6:
            home = model.random.choice((0, 0, 0, 1, 2, 3))
            arrive_local(model, home, model.random.randint(8, 24), model.random.randint(1, 40))
        model.step()
        moved |= {req.rid for home in model.homes for req in home.waiting_queue if req.dyncp_placement.shards != (home.participant.rank,)}  # type: ignore[union-attr]
    random_walk(model, 100)
    assert len(moved) > 3


@pytest.mark.parametrize("flexible", [True, False])
def test_asks_that_take_what_it_waits_for_do_not_starve_it(flexible: bool) -> None:
    """It needs more than half of a pool, they a quarter of each, and some always wait: no pool ever has so much free. Those that are
    retracted wait likewise, and before it."""
    model = cluster(2)

    def keep_busy() -> None:
        while sum(home.num_waiting for home in model.homes) < 4:
            home = model.num_requests % 2
            model.arrive(home, 2 * 3 * PAGE, model.random.randint(10, 30), (1 - home, home), flexible=True)

    for _ in range(60):
        keep_busy()
        model.step()
    req, start = arrive_local(model, 0, 10 * PAGE, 10, flexible=flexible), model.num_steps
    while not req.output_ids:
        assert model.num_steps - start < 3 * OVERTAKEN_STEPS, "starved"
        keep_busy()
        model.step()
    assert req.dyncp is not None and (flexible or req.dyncp.shards == (0,))
    model.drain(2_000)


def test_one_behind_local_ones_alone_stays_local() -> None:
    """SGLang's order is fair among them, and the prefix cache theirs."""
    model = ProtocolModel(1, 2, PAGES, PAGE, chunk_tokens=PAGES * PAGE, check_every=10**6)
    for home in (0, 1):
        arrive_local(model, home, 5 * PAGE, 300, flexible=False)
    run(model, 3)
    req = arrive_local(model, 0, 12 * PAGE, 10)
    model.homes[0].running, model.homes[1].running = [], []  # they stand still
    run(model, OVERTAKEN_STEPS + 50)
    assert req.dyncp is None and not req.output_ids
