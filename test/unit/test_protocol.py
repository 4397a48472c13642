"""The whole protocol under random load: one owner per page, nothing lost, nobody starves, everything drains."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sglang_dcp.ledger.integrity import check_cluster
from sglang_dcp.ledger.promise_turns import FIRST_TURN_STEPS
from testing.protocol.model import ProtocolModel, random_walk

NUM_PAGES, PAGE_SIZE = 8, 4


class ProtocolMachine(RuleBasedStateMachine):
    """Hypothesis chooses arrivals, aborts and the moments in between; the model checks itself after every step."""

    @initialize(
        num_instances=st.integers(2, 4),
        max_degree=st.integers(1, 4),
        chunk_pages=st.integers(1, 4),
        fraction=st.sampled_from([1.0, 0.5, 0.25, 0.0]),
        scope=st.sampled_from([None, "node", "cluster"]),
    )
    def start(self, num_instances, max_degree, chunk_pages, fraction, scope):
        has_nodes = scope is not None and num_instances % 2 == 0
        self.model = ProtocolModel(
            0,
            num_instances,
            NUM_PAGES,
            PAGE_SIZE,
            chunk_tokens=chunk_pages * PAGE_SIZE,
            max_degree=min(max_degree, num_instances // 2 if has_nodes and scope == "node" else num_instances),
            max_guest_fraction=fraction,
            num_nodes=2 if has_nodes else 1,
            scope=scope or "node",
        )

    @rule(home=st.integers(0, 3), prompt=st.integers(1, 20), max_new=st.integers(1, 11))
    def local_request(self, home, prompt, max_new):
        model = self.model
        # SGLang cuts an output so that a page is left when the request has all the pools that it may use to itself.
        room = (model.max_degree * NUM_PAGES - -(-prompt // PAGE_SIZE) - 1) * PAGE_SIZE - 1
        model.arrive(home % model.num_instances, prompt, max(1, min(max_new, room)))

    @rule(home=st.integers(0, 3), order=st.permutations(range(4)), degree=st.integers(1, 4), data=st.data(), flexible=st.booleans())
    def sharded_request(self, home, order, degree, data, flexible):
        model = self.model
        degree = min(degree, model.max_degree)
        reach = model.limits.most_pages
        pages = min(degree * (NUM_PAGES - 3), reach - 3)
        prompt = data.draw(st.integers(degree * PAGE_SIZE, pages * PAGE_SIZE))
        able = (
            model.limits.members_for(home % model.num_instances, prompt // PAGE_SIZE + 2)
            if flexible
            else model.limits.group(home % model.num_instances)
        )
        shards = tuple(rank for rank in order if rank in able)[:degree]
        room = (reach - 1) * PAGE_SIZE - prompt
        model.arrive(home % model.num_instances, prompt, data.draw(st.integers(1, min(room, 24))), shards, flexible=flexible)

    @rule(home=st.integers(0, 3), which=st.integers(0, 50))
    def abort(self, home, which):
        scheduler = self.model.homes[home % self.model.num_instances]
        if scheduler.requests:
            scheduler.abort(scheduler.requests[which % len(scheduler.requests)])

    @rule(count=st.integers(1, 12))
    def steps(self, count):
        for _ in range(count):
            self.model.step()

    @invariant()
    def books_agree_when_nothing_is_in_flight(self):
        if not hasattr(self, "model") or any(home.participant.outbox for home in self.model.homes):
            return
        books = [home.participant for home in self.model.homes]
        check_cluster({book.rank: book.homes for book in books}, {book.rank: book.guests for book in books})

    def teardown(self):
        if hasattr(self, "model"):
            self.model.drain(20_000)


TestProtocolMachine = ProtocolMachine.TestCase
TestProtocolMachine.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)

SHAPES = [(2, 8, 4), (2, 12, 16), (3, 12, 8), (2, 20, 4), (2, 8, 8), (4, 8, 16), (2, 12, 4), (2, 16, 16)]
"""(instances, pages per pool, page size); mostly two instances, where a step of the model is cheapest."""
FRACTIONS = (1.0, 1.0, 0.5, 1.0, 0.25, 1.0, 0.0)
"""--dyncp-max-guest-fraction of a walk. Every step is checked against it, the degree and the nodes (limit_checks.py)."""


def walk(num_steps: int, *, check_every: int) -> ProtocolModel:
    """`num_steps` in walks of at least 4,000 over all shapes; every walk ends drained. Returns the last model."""
    left, seed, longest = num_steps, 0, max(4_000, num_steps // 100)
    while left > 0:
        shape = SHAPES[seed % len(SHAPES)]
        model = ProtocolModel(
            seed,
            *shape,
            chunk_tokens=3 * shape[2],
            max_degree=2 if seed % 3 == 0 else None,
            max_guest_fraction=FRACTIONS[seed % len(FRACTIONS)],
            num_nodes=2 if seed % 4 == 1 and shape[0] % 2 == 0 else 1,
            scope="cluster" if shape[0] < 4 else "node",
            check_every=check_every,
        )
        random_walk(model, min(left, longest))
        left -= model.num_steps
        seed += 1
        assert all(model.num_growths) or model.num_steps < 2_000
    return model


def test_random_walk_checked_after_every_step():
    walk(20_000, check_every=1)


LIMITS = [
    {"max_degree": 2},
    {"max_guest_fraction": 0.5},
    {"max_guest_fraction": 0.0},
    {"num_nodes": 2},
    {"num_nodes": 2, "max_guest_fraction": 0.5},
    {"num_nodes": 2, "scope": "cluster"},
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_walk_keeps_each_limit_of_a_split(limits, seed):
    """Degree, guest pages and nodes, in every grant and growth; no pages stay promised on an empty cluster; pins outlive retractions."""
    model = ProtocolModel(seed, 4, 8, 16, chunk_tokens=48, check_every=50, **limits)
    random_walk(model, 1_500, arrival=0.3)
    assert sum(home.num_retractions for home in model.homes) > 0


@pytest.mark.parametrize("num_nodes", [9, 6])
def test_a_walk_of_seventy_two_instances(num_nodes):
    """Nodes of 8 and of 12: more instances than a route has bits, and every grant is looked at."""
    model = ProtocolModel(3, 72, 8, 16, num_nodes=num_nodes, check_every=25, chunk_tokens=48)
    random_walk(model, 60, arrival=0.97)
    assert model.num_requests > 40 and sum(model.num_growths) > 0


def test_rows_that_leave_a_node_are_told_from_others():
    """Two nodes of two: a request over three pools crosses, one over its node's two does not. Seen by its home and by its shards."""
    for scope, shards, crossing in (("cluster", (1, 2, 0), [True, False, True, False]), ("cluster", (1, 0), [False] * 4)):
        model = ProtocolModel(1, 4, 8, 4, num_nodes=2, scope=scope, chunk_tokens=100)
        request = model.arrive(0, 4 * (6 * len(shards) - 2), 6, shards)
        while not request.output_ids:
            model.step()
        model.step()
        assert [home.runtime.rows.leaves_node() for home in model.homes] == crossing


@pytest.mark.timeout(900)
def test_long_random_walk():
    """Pages are counted in and out by the pools in every step; the full check comes every 50."""
    walk(LONG_WALK_STEPS, check_every=50)


LONG_WALK_STEPS = int(os.environ.get("DYNCP_WALK_STEPS", "40000"))
"""Ten walks: every shape and every fraction. `make walk` takes 1,000,000, which is two minutes."""


def test_a_long_request_is_admitted_into_a_steady_stream_of_short_ones():
    """Each home always has short local requests waiting; a request over all pools gets its pages within the life of those that run."""
    model = ProtocolModel(7, 4, 16, 16, chunk_tokens=64)
    lives = 12

    def keep_busy():
        for rank, home in enumerate(model.homes):
            while len(home.waiting_queue) < 3:
                model.arrive(rank, 20, lives)

    for _ in range(50):
        keep_busy()
        model.step()
    long = model.arrive(0, 4 * 12 * 16, 40, (1, 2, 3, 0))
    for _ in range(10 * lives):
        keep_busy()
        model.step()
        if long.dyncp is not None and long.dyncp.admitted:
            break
    assert long.dyncp is not None and long.dyncp.admitted, "starved"
    for _ in range(600):
        keep_busy()
        model.step()
    assert long.finished_in_step is not None


@pytest.mark.parametrize("num_pages", [8, 16])
@pytest.mark.parametrize(("prompt", "lives"), [((1, 4), (5, 5)), ((4, 4), (2, 10)), ((4, 8), (9, 9))])
def test_short_ones_that_fit_exactly_what_others_free(num_pages, prompt, lives):
    """Promising only pages that are free already starves the long request here for more than 1,500 steps: its room is refilled at once."""
    model = ProtocolModel(7, 2, num_pages, 4, chunk_tokens=64, check_every=10)

    def keep_busy():
        for rank, home in enumerate(model.homes):
            while len(home.waiting_queue) < 6:
                model.arrive(rank, model.random.randint(*prompt), model.random.randint(*lives))

    for _ in range(60):
        keep_busy()
        model.step()
    long = model.arrive(0, (num_pages - 2) * 2 * 4, 10, (1, 0))
    for _ in range(40):
        keep_busy()
        model.step()
        if long.dyncp is not None and long.dyncp.admitted:
            return
    pytest.fail("starved")


def test_a_prompt_of_the_cluster_s_size_does_not_stop_the_others():
    """They last for longer than its first turns. They go on starting while it waits, and it starts all the same."""
    model = ProtocolModel(7, 2, 96, 16, chunk_tokens=64, check_every=10)
    lives, starts = 200, []

    def keep_busy():
        for rank, home in enumerate(model.homes):
            while len(home.waiting_queue) < 3:
                model.arrive(rank, 20, model.random.randint(lives // 2, lives))

    def run(steps):
        for _ in range(steps):
            keep_busy()
            queued = {req.rid for home in model.homes for req in home.waiting_queue}
            model.step()
            starts.append(len(queued) - sum(req.rid in queued for home in model.homes for req in home.waiting_queue))

    run(2 * lives)
    usual = sum(starts[lives:]) / lives
    long = model.arrive(0, 180 * 16, 10, (1, 0))
    before = len(starts)
    while long.dyncp is None or not long.dyncp.admitted:
        run(1)
        assert len(starts) < before + 12 * lives, "starved"
    wait = starts[before:]
    assert len(wait) > 2 * FIRST_TURN_STEPS
    assert sum(wait[FIRST_TURN_STEPS : 2 * FIRST_TURN_STEPS]) >= usual * FIRST_TURN_STEPS / 2


def test_a_growing_request_gets_its_page_from_pools_full_of_short_ones():
    """Short local requests take every free page at once; the one that outgrew its pool still goes on, and is never sent back."""
    model = ProtocolModel(8, 2, 12, 4, chunk_tokens=16)
    long = model.arrive(0, 8, 60)
    for _ in range(3_000):
        for rank, home in enumerate(model.homes):
            while len(home.waiting_queue) < 4:
                model.arrive(rank, 5, 6)
        model.step()
        if long.finished_in_step is not None:
            break
    assert long.finished_in_step is not None, "starved"


def test_a_ready_request_starts_behind_a_local_one_that_does_not_fit():
    """Its pages are what the local one waits for: held back, both would wait for ever."""
    model = ProtocolModel(9, 2, 8, 4, chunk_tokens=16)
    first = model.arrive(0, 24, 2, (1, 0))
    model.arrive(0, 24, 2)
    sharded = model.arrive(0, 40, 4, (1, 0))
    model.drain(500)
    assert first.finished() and sharded.finished()


def test_eight_requests_over_all_pools_at_once():
    model = ProtocolModel(10, 4, 16, 16, chunk_tokens=64)
    requests = [model.arrive(i % 4, 52 * 16, 30, tuple((i + j) % 4 for j in range(1, 5)), flexible=i % 2 == 0) for i in range(8)]
    alone = ProtocolModel(10, 4, 16, 16, chunk_tokens=64)
    alone.arrive(0, 52 * 16, 30, (1, 2, 3, 0))
    alone.drain(1_000)
    model.drain(8 * 2 * alone.num_steps)
    assert all(request.finished() for request in requests)


def test_abort_between_grant_and_page_numbers():
    """The grant is decided in one step, the shard's page numbers come in the next: a release in between leaves nothing behind."""
    for wait in range(5):
        model = ProtocolModel(11, 2, 8, 4)
        req = model.arrive(0, 40, 4, (1, 0))
        for _ in range(wait):
            model.step()
        model.homes[0].abort(req)
        model.drain(20)
