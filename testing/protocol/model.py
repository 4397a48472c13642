"""`num_instances` homes in lock step, and a random walk over them."""

from __future__ import annotations

import random
from typing import Any

from sglang_dcp.config import DynCpConfig
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.mutants import install_mutant
from sglang_dcp.policy.types import Placement
from sglang_dcp.upstream.step.runtime import cluster_of
from testing.limit_checks import LimitChecks
from testing.protocol.checks import WrittenKv, check_asked_pages, check_owners
from testing.protocol.fakes import FakePool, ModelKv, ModelRequest
from testing.protocol.scheduler import ModelScheduler


class ProtocolModel:
    """`num_instances` homes in lock step. Deterministic in `seed`."""

    scheduler_class: type[ModelScheduler] = ModelScheduler
    request_class: type[ModelRequest] = ModelRequest

    def __init__(
        self,
        seed: int,
        num_instances: int,
        num_pages: int,
        page_size: int,
        *,
        chunk_tokens: int = 24,
        max_degree: int | None = None,
        max_guest_fraction: float = 1.0,
        num_nodes: int = 1,
        scope: str = "node",
        check_every: int = 1,
        cache_fraction: float = 0.8,
    ) -> None:
        install_mutant()
        self.random = random.Random(seed)
        self.num_instances, self.num_pages, self.page_size = num_instances, num_pages, page_size
        config = DynCpConfig(
            max_degree=max_degree,
            max_guest_fraction=max_guest_fraction,
            num_nodes=num_nodes,
            scope=scope,
            cache_fraction=cache_fraction,
            cache_min_tokens=page_size,
        ).resolve(num_instances)
        self.max_degree = config.max_degree or num_instances
        self.limits = LimitChecks(
            num_instances,
            num_pages,
            self.max_degree,
            int(max_guest_fraction * num_pages),
            num_instances // num_nodes,
            crosses=scope == "cluster",
        )
        cluster, pools = cluster_of(config, num_instances, num_pages, page_size), [FakePool(num_pages) for _ in range(num_instances)]
        self.homes = [self.scheduler_class(config, Participant(cluster, rank, pool), pool, chunk_tokens) for rank, pool in enumerate(pools)]
        self.num_steps = self.num_requests = 0
        self.num_growths = [0] * num_instances  # by home
        self.kv = WrittenKv(num_instances, page_size)
        self.check_every = check_every

    # ---- what happens to the model

    def arrive(
        self,
        home: int,
        prompt: int | list[int],
        max_new: int,
        shards: tuple[int, ...] | None = None,
        *,
        flexible: bool = False,
    ) -> ModelRequest:
        """A request at `home`, local or split evenly over `shards` (tail last). prompt: its tokens, or how many of its own."""
        self.num_requests += 1
        ids = [self.num_requests] * prompt if isinstance(prompt, int) else prompt
        prompt = len(ids)
        placement = None
        if shards is not None:
            pages = -(-prompt // self.page_size)
            share = max(1, pages // len(shards))
            tokens = [share * self.page_size] * (len(shards) - 1)
            placement = Placement(home, shards, (*tokens, prompt - sum(tokens)))
        req = self.request_class(f"r{self.num_requests}", ids, max_new, placement, flexible, ModelKv(self.num_requests))
        self.homes[home].add(req)
        return req

    def next_turn(self, req: ModelRequest, home: int, more: int, max_new: int, shards: tuple[int, ...], **kwargs: Any) -> ModelRequest:
        """A request that begins with all of an earlier one, then has `more` tokens of its own (below 0: branches off earlier)."""
        ids = req.full_untruncated_fill_ids
        ids = ids + [self.num_requests + 1] * more if more >= 0 else ids[:more] + [self.num_requests + 1] * 2 * self.page_size
        return self.arrive(home, ids, max_new, shards, **kwargs)

    def turn_at_random(self) -> None:
        """Of a request that is over, mostly at its home; where it lay, on one instance, or anywhere."""
        choose = self.random
        home = choose.randrange(self.num_instances)
        done = [req for req in self.homes[home].done[-12:] if req.was_managed]
        if not done:
            return
        req = choose.choice(done)
        most = min(self.limits.most_pages - 3, self.max_degree * (self.num_pages - 2)) * self.page_size
        more = choose.randint(-len(req.origin_input_ids), 2 * self.page_size)
        if choose.random() < 0.7:
            more = choose.randint(0, 3 * self.page_size)
        length = len(req.full_untruncated_fill_ids) + more + (0 if more >= 0 else 2 * self.page_size)
        if not 0 < length < most:
            return
        home = home if choose.random() < 0.9 else choose.randrange(self.num_instances)
        max_new = choose.randint(1, max(1, min(most - length, self.num_pages * self.page_size // 2)))
        if length < (self.num_pages - 3) * self.page_size and choose.random() < 0.5:
            self.next_turn(req, home, more, max_new, (home,), flexible=choose.random() < 0.8)
            return
        # As page_segments asks: the prompt's pages and one tail page.
        members = self.limits.members_for(home, -(-length // self.page_size) + 1)
        degree = min(len(members), self.max_degree, max(1, length // self.page_size))
        self.next_turn(req, home, more, max_new, tuple(choose.sample(members, degree)), flexible=True)

    def arrive_at_random(self) -> ModelRequest:
        choose = self.random
        home, pool = choose.randrange(self.num_instances), self.num_pages * self.page_size
        if choose.random() < 0.6:
            prompt = choose.randint(1, pool // 3)
            return self.arrive(home, prompt, choose.randint(1, max(1, pool // 2)))
        degree, reach = choose.randint(1, self.max_degree), self.limits.most_pages
        pages = choose.randint(degree, max(degree, min(degree * (self.num_pages - 3), reach - 3)))
        prompt = pages * self.page_size - choose.randrange(self.page_size)
        max_new = choose.randint(1, max(1, min((reach - 1 - pages) * self.page_size - 1, pool // 2)))
        flexible = choose.random() < 0.5
        members = self.limits.members_for(home, pages + 1) if flexible else self.limits.group(home)
        shards = tuple(choose.sample(members, min(degree, len(members))))
        return self.arrive(home, prompt, max_new, shards, flexible=flexible)

    def abort_at_random(self) -> None:
        home = self.random.choice(self.homes)
        if home.requests:
            home.abort(self.random.choice(home.requests))

    def step(self) -> None:
        homes = self.homes
        for home in homes:
            home.schedule()
        columns = [home.columns() for home in homes]
        words = [home.participant.own_words for home in homes]
        anybody_runs = any(home.batch for home in homes)
        for home in homes:
            home.participant.read_columns(columns)
        decisions = [home.participant.finish_step(words, anybody_runs) for home in homes]
        assert all(decision == decisions[0] for decision in decisions), decisions
        for grant in decisions[0].grants:
            self.num_growths[grant.home] += not grant.previous and grant.segments[0].first_index > 0
        self.limits.check_step(columns, words, decisions[0])
        self.run_batches()
        self.kv.write(homes, read=self.num_steps % min(self.check_every, 5) == 0)
        for home in homes:
            home.complete_batch()
        self.num_steps += 1
        if self.num_steps % self.check_every == 0:
            check_owners(homes)

    def drain(self, most_steps: int) -> None:
        """No more arrivals: everything must finish, and every pool must be whole again."""
        start = self.num_steps
        while any(home.requests or home.participant.outbox or home.runtime.queues.waiting for home in self.homes):
            assert self.num_steps - start < most_steps, f"not drained after {most_steps} steps: {[len(h.requests) for h in self.homes]}"
            self.step()
        for home in self.homes:
            home.participant.release_retained()
        while any(home.participant.outbox for home in self.homes):
            self.step()
        check_owners(self.homes)
        for home in self.homes:
            assert home.pool.num_givable_pages() == self.num_pages
            assert not home.participant.busy() and not len(home.participant.table)

    def run_batches(self) -> None:
        """Stands for the layers of a step."""
        if self.num_steps % min(self.check_every, 5) == 0:
            check_asked_pages(self.homes)


def random_walk(model: ProtocolModel, num_steps: int, *, arrival: float = 0.12, abort: float = 0.02, most_waiting: int = 6) -> None:
    """Steps with arrivals and aborts in between; then the drain."""
    choose = model.random
    for _ in range(num_steps):
        if choose.random() < arrival and sum(home.num_waiting for home in model.homes) < most_waiting:
            model.arrive_at_random()
        if choose.random() < arrival and sum(home.num_waiting for home in model.homes) < most_waiting:
            model.turn_at_random()
        if choose.random() < abort:
            model.abort_at_random()
        model.step()
    model.drain(100_000)
