"""The protocol over pools that are large enough to leave pages to growth: who runs goes on, and nobody starves for it."""

from __future__ import annotations

import pytest

from sglang_dcp.ledger.promise_turns import LONG_WAIT_STEPS
from sglang_dcp.policy import split_limits
from testing.protocol.model import ProtocolModel, random_walk

PAGES, PAGE = 960, 16
LEFT = PAGES // split_limits.GROWTH_SHARE


def test_the_pools_leave_some():
    assert LEFT == 9


def steps_until_admitted(model, long, keep_busy, most_steps):
    for step in range(most_steps):
        keep_busy()
        model.step()
        if long.dyncp is not None and long.dyncp.admitted:
            return step
    pytest.fail(f"starved; free {[home.pool.num_givable_pages() for home in model.homes]}")


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("pages", [900, PAGES - LEFT, PAGES - 1])
def test_short_local_requests_do_not_starve_a_long_one(seed, pages):
    """They come to both pools, always; it needs so many pages of each, at last all but those that growth is left."""
    model = ProtocolModel(seed, 2, PAGES, PAGE, chunk_tokens=1000, check_every=100, cache_fraction=0.0)

    def keep_busy():
        for rank, home in enumerate(model.homes):
            while len(home.waiting_queue) < 6:
                model.arrive(rank, model.random.randint(16, 60), model.random.randint(20, 60))

    for _ in range(150):
        keep_busy()
        model.step()
    long = model.arrive(0, pages * 2 * PAGE, 10, (1, 0))
    steps_until_admitted(model, long, keep_busy, 1500)


def wait_beside_guests(tokens, prompts, most_steps):
    """Six requests of home 0 whose pages lie on instance 2 and that grow at home: pool 0 is never without anybody. One of so many tokens
    asks for instances 0 and 1."""
    model = ProtocolModel(1, 3, PAGES, PAGE, chunk_tokens=100_000, check_every=100, cache_fraction=0.0, max_degree=2)

    def keep_busy():
        home = model.homes[0]
        while len(home.running) + len(home.waiting_queue) < 6:
            model.arrive(0, model.random.randint(*prompts), model.random.randint(20, 60), (2,))

    for _ in range(50):
        keep_busy()
        model.step()
    steps_until_admitted(model, model.arrive(0, tokens, 10, (1, 0)), keep_busy, most_steps)


@pytest.mark.parametrize("pages", [900, 930])
def test_requests_that_lie_elsewhere_do_not_starve_one_at_home(pages):
    wait_beside_guests(pages * 2 * PAGE, (160, 600), 300)


@pytest.mark.parametrize("pages", [948, PAGES - LEFT, 956])
def test_an_ask_of_nearly_the_pool_waits_a_while_and_no_longer(pages):
    wait_beside_guests((2 * pages - 1) * PAGE, (16, 60), 400)


@pytest.mark.parametrize(("free", "starts"), [(35, 0), (30, LONG_WAIT_STEPS), (25, LONG_WAIT_STEPS)])
def test_a_local_request_that_has_waited_long_takes_what_is_left(free, starts):
    """Of a pool that a guest holds for good: 22 pages, one for the next token among them. Sharded ones behind it do not wait."""
    model = ProtocolModel(1, 2, PAGES, PAGE, chunk_tokens=100_000, check_every=100, cache_fraction=0.0)
    model.arrive(1, (PAGES - free - 1) * PAGE, 9, (0,))
    for _ in range(4):
        model.step()
    for home in model.homes:
        home.running[:] = []  # the guest's home stands still
    req, behind = model.arrive(0, 21 * PAGE, 3, (0,)), model.arrive(0, 8 * PAGE, 3, (1,))
    for step in range(200):
        model.step()
        if step == 8:
            assert behind.output_ids
        if req.output_ids:
            assert starts <= step <= starts + 12
            return
    pytest.fail("never started")


def test_a_local_request_starts_when_a_guest_has_left():
    """SGLang would look at its queue only when one of its own requests has left, and that one decodes for long."""
    model = ProtocolModel(1, 2, PAGES, PAGE, chunk_tokens=100_000, check_every=50, cache_fraction=0.0)
    model.arrive(0, 20, 2000)
    for _ in range(5):
        model.step()
    guest = model.arrive(1, 899 * PAGE, 60, (0,))
    for _ in range(10):
        model.step()
    req, looked = model.arrive(0, 80 * PAGE, 5, (0,)), 0
    while not guest.finished():
        model.step()
        looked += not model.homes[0].running_batch.batch_is_full
    assert looked < 10, "it looks where something has changed, not in every step"
    for _ in range(4):
        model.step()
    assert req.output_ids


def sitting_out(pages, steps=1500):
    """Request steps sat out while long requests come as fast as they are admitted, over two pools of so many pages; requests finished."""
    model = ProtocolModel(2, 2, pages, PAGE, chunk_tokens=pages * PAGE, check_every=steps, cache_fraction=0.0)
    sat_out = 0
    for step in range(steps):
        if sum(len(home.waiting_queue) for home in model.homes) < 8:
            prompt, home = model.random.randint(20 * PAGE, 60 * PAGE), step % 2
            model.arrive(home, prompt, model.random.randint(30, 90), (1 - home, home), flexible=True)
        model.step()
        sat_out += sum(len(home.runtime.queues.parked) for home in model.homes)
    finished = sum(len(home.done) for home in model.homes)
    model.drain(3000)
    return sat_out, finished


def test_who_runs_in_full_pools_goes_on(monkeypatch):
    """Without pages for growth the pools fill to the last one, and requests sit out; what is served is no more."""
    monkeypatch.setattr(ProtocolModel, "run_batches", lambda _model: None)
    sat_out, finished = sitting_out(1000)
    monkeypatch.setattr(split_limits, "GROWTH_SHARE", 10**9)
    without, finished_without = sitting_out(1000)
    assert without > 100 and sat_out * 20 < without
    assert finished >= 0.99 * finished_without


@pytest.mark.parametrize("seed", range(3))
def test_a_walk_over_such_pools(seed):
    model = ProtocolModel(seed, 3, 2 * split_limits.GROWTH_SHARE, 2, check_every=10)
    random_walk(model, 400, arrival=0.3)


def test_decodes_between_two_chunks_leave_a_local_prompt_its_pages():
    """SGLang would end at the next chunk (--prefill-decode-interval): they grow on the other instance instead."""
    model = ProtocolModel(1, 2, 32, 4, chunk_tokens=16)
    runs = [model.arrive(0, 4, 60) for _ in range(3)]
    for _ in range(4):
        model.step()
    model.homes[0].decode_interval = 10
    prompt = model.arrive(0, 24 * 4, 2)
    while not prompt.output_ids:
        model.step()
    assert any(1 in req.dyncp.shards for req in runs if req.dyncp is not None)
    model.drain(500)
    assert not model.homes[0].num_retractions
