"""State of the simulated instances: pages, tokens, rows. Every change goes through one method, so conservation can be checked."""

from __future__ import annotations

import numpy as np

from sglang_dcp.policy.split_limits import SplitLimits
from sglang_dcp.policy.types import InstanceLoad, Placement


class SimulatedRequest:
    """One request on its way. `tokens[rank]` are KV tokens held there, exact up to `tail_since`; times in seconds."""

    __slots__ = (
        "admitted",
        "arrival",
        "decoded",
        "end_degree",
        "finish",
        "finish_step",
        "home",
        "identity",
        "output",
        "page_step",
        "pages",
        "placement",
        "prefill_left",
        "prompt",
        "queued",
        "ready",
        "retractions",
        "start_degree",
        "tail",
        "tail_since",
        "tokens",
        "wait",
    )

    def __init__(self, identity: int, arrival: float, prompt: int, output: int) -> None:
        self.identity = identity
        self.arrival = arrival
        self.prompt = prompt
        self.output = output
        self.ready = arrival
        self.queued = arrival
        self.wait = 0.0
        self.admitted = -1.0
        self.finish = -1.0
        self.decoded = 0
        self.retractions = 0
        self.start_degree = 0
        self.end_degree = 0
        self.placement: Placement | None = None
        self.home = -1
        self.tail = -1
        self.tail_since = 0
        self.finish_step = -1
        self.page_step = -1
        self.prefill_left = 0
        self.tokens: dict[int, int] = {}
        self.pages: dict[int, int] = {}


class Cluster:
    """Pools, batches and routed rows of all instances.

    `loads` is what policies see: pages held plus pages promised to placed requests, in tokens. `free_pages` counts pages held only, and so
    does `guest_room`, what new guests may still take; below 0 where guests have grown beyond it.
    """

    def __init__(self, limits: SplitLimits, page_size: int) -> None:
        num_instances = limits.layout.num_instances
        self.page_size = page_size
        self.pool_pages = limits.pool_pages
        self.nodes = limits.layout.nodes
        self.guest_room = [limits.guest_pages] * num_instances
        capacity = self.pool_pages * page_size
        self.loads = [InstanceLoad(rank=rank, node=self.nodes[rank], kv_tokens=0, kv_capacity=capacity) for rank in range(num_instances)]
        self.free_pages = [self.pool_pages] * num_instances
        self.kv_tokens = np.zeros(num_instances)
        self.tails = np.zeros(num_instances)
        self.batch = np.zeros(num_instances)
        self.rows = np.zeros(num_instances)
        self.routed = np.zeros((4, num_instances))  # out, in, remote out, remote in
        self.num_routed = 0
        self.num_remote = 0
        self.residents: list[dict[int, SimulatedRequest]] = [{} for _ in range(num_instances)]

    def promise(self, request: SimulatedRequest, placement: Placement) -> None:
        """Counts a placement in what policies see; it holds no page yet."""
        request.placement = placement
        size = self.page_size
        request.home, request.tail = placement.home, placement.tail
        request.pages = {rank: -(-tokens // size) for rank, tokens in zip(placement.shards, placement.shard_tokens, strict=True)}
        request.tokens = dict(zip(placement.shards, placement.shard_tokens, strict=True))
        for rank, pages in request.pages.items():
            load = self.loads[rank]
            load.kv_tokens += pages * size
            load.attention_rows += 1
            if rank != request.home:
                load.guest_tokens += pages * size
        self.loads[request.home].home_requests += 1

    def withdraw(self, request: SimulatedRequest) -> None:
        """The reverse of promise, for what the request holds or is promised now."""
        for rank, pages in request.pages.items():
            load = self.loads[rank]
            load.kv_tokens -= pages * self.page_size
            load.attention_rows -= 1
            if rank != request.home:
                load.guest_tokens -= pages * self.page_size
        self.loads[request.home].home_requests -= 1

    def take_pages(self, request: SimulatedRequest) -> None:
        """Turns the promise into held pages."""
        for rank, pages in request.pages.items():
            if self.free_pages[rank] < pages:
                raise AssertionError(f"instance {rank} has {self.free_pages[rank]} free pages, request {request.identity} takes {pages}")
            self._hold(request, rank, pages)
            self.residents[rank][request.identity] = request
            self.kv_tokens[rank] += request.tokens[rank]

    def start_rows(self, request: SimulatedRequest, step: int) -> None:
        """The request joins the decode batch."""
        self.batch[request.home] += 1
        self.tails[request.tail] += 1
        request.tail_since = step
        for rank in request.pages:
            self._count_row(request.home, rank, 1)

    def stop_rows(self, request: SimulatedRequest, step: int) -> None:
        """The request leaves the decode batch and keeps its pages; settles the tokens decoded on the tail."""
        self.settle(request, step)
        self.batch[request.home] -= 1
        self.tails[request.tail] -= 1
        for rank in request.pages:
            self._count_row(request.home, rank, -1)

    def settle(self, request: SimulatedRequest, step: int) -> None:
        """Books the tokens that the tail took since `tail_since`."""
        gained = step - request.tail_since
        request.tokens[request.tail] += gained
        request.decoded += gained
        request.tail_since = step

    def add_page(self, request: SimulatedRequest, rank: int) -> None:
        """One more page on `rank`, which may be a new shard. The request must be out of the decode batch unless rank is its tail."""
        self._hold(request, rank, 1)
        load = self.loads[rank]
        load.kv_tokens += self.page_size
        if rank not in request.pages:
            request.pages[rank] = 0
            request.tokens[rank] = 0
            self.residents[rank][request.identity] = request
            load.attention_rows += 1
        request.pages[rank] += 1
        if rank != request.home:
            load.guest_tokens += self.page_size

    def move_pages(self, request: SimulatedRequest, source: int, target: int, pages: int) -> None:
        """Full pages of a decoding request change their instance; the tail and at least one page stay. Settle its tokens first."""
        tokens = pages * self.page_size
        if not 0 < pages < request.pages[source] or self.free_pages[target] < pages:
            raise AssertionError(f"{pages} pages of request {request.identity} cannot move from {source} to {target}")
        for rank, sign in ((source, -1), (target, 1)):
            if rank not in request.pages:
                request.pages[rank] = request.tokens[rank] = 0
                self.residents[rank][request.identity] = request
                self.loads[rank].attention_rows += 1
                self._count_row(request.home, rank, 1)
            request.pages[rank] += sign * pages
            request.tokens[rank] += sign * tokens
            self._hold(request, rank, sign * pages)
            self.kv_tokens[rank] += sign * tokens
            self.loads[rank].kv_tokens += sign * tokens
            if rank != request.home:
                self.loads[rank].guest_tokens += sign * tokens

    def release(self, request: SimulatedRequest) -> None:
        """Frees every page. The request must be out of the decode batch."""
        self.withdraw(request)
        for rank, pages in request.pages.items():
            self._hold(request, rank, -pages)
            self.kv_tokens[rank] -= request.tokens[rank]
            del self.residents[rank][request.identity]
        request.pages, request.tokens = {}, {}

    def _hold(self, request: SimulatedRequest, rank: int, pages: int) -> None:
        self.free_pages[rank] -= pages
        if rank != request.home:
            self.guest_room[rank] -= pages

    def _count_row(self, home: int, rank: int, sign: int) -> None:
        self.rows[rank] += sign
        if rank == home:
            return
        self.routed[0, home] += sign
        self.routed[1, rank] += sign
        self.num_routed += sign
        if self.nodes[rank] != self.nodes[home]:
            self.routed[2, home] += sign
            self.routed[3, rank] += sign
            self.num_remote += sign
