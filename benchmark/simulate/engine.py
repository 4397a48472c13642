"""The simulation loop: arrivals are placed, reservations granted in order, every step decodes one token per running request."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence

from benchmark.simulate.cluster import Cluster, SimulatedRequest
from benchmark.simulate.moves import move_pages
from benchmark.simulate.results import Recorder, SimulationResult
from benchmark.simulate.settings import SimulationSettings
from benchmark.simulate.shortage import order_of, promised_to_growth, tail_with_room, youngest_on
from benchmark.simulate.step_time import decode_us, run_chunks
from sglang_dcp.policy.cost_model import CostModel
from sglang_dcp.policy.growth import choose_victim
from sglang_dcp.policy.types import CapacityError, PlacementPolicy, PlacementRequest


class Simulation:
    """One run. `step_hook(simulation)` is called after every step (tests check conservation with it)."""

    def __init__(
        self,
        requests: Sequence[tuple[float, int, int]],
        policy: PlacementPolicy,
        cost: CostModel,
        settings: SimulationSettings,
        step_hook: Callable[[Simulation], None] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.requests = [SimulatedRequest(i, *row) for i, row in enumerate(requests)]
        self.policy = policy
        self.cost = cost
        self.settings = settings
        self.limits = settings.limits()
        self.cluster = Cluster(self.limits, settings.page_size)
        self.recorder = Recorder(settings)
        self.clock = 0.0
        self.step = 0
        self.num_running = 0
        self.waiting: list[SimulatedRequest] = []
        self.stalled: list[SimulatedRequest] = []
        self.unstable = False
        self._next_arrival = 0
        self._delayed: list[tuple[float, int]] = []
        self._finishing: dict[int, list[SimulatedRequest]] = {}
        self._page_full: dict[int, list[SimulatedRequest]] = {}
        self._prefilling: list[deque[SimulatedRequest]] = [deque() for _ in range(settings.num_instances)]
        self._num_prefilling = 0
        self._ended_prefill: list[SimulatedRequest] = []
        self._changed = True
        self._estimate_total = settings.first_estimate * 16
        self._estimate_count = 16
        self._step_hook = step_hook
        self._progress = progress

    def run(self) -> SimulationResult:
        """Runs until every request has finished or the run is given up as unstable."""
        total = len(self.requests)
        limit = max(50, int(self.settings.overload_fraction * total))
        while True:
            self._admit_arrivals()
            if self._changed:
                self._retry_stalled()
                self._grant()
            if not self.num_running and not self._num_prefilling and not self._skip_idle_time():
                break
            if self.num_running or self._num_prefilling:
                self._run_step()
            if len(self.waiting) > limit:
                self.unstable = True
                break
            if self._progress is not None and self.step % 512 == 0:
                self._progress(self.recorder.num_finished / total)
        return self.recorder.summarise(self.requests, self.unstable)

    # Arrivals and admission

    def _skip_idle_time(self) -> bool:
        """Nothing runs: moves the clock to the next arrival. False when there is none."""
        times = [self.requests[self._next_arrival].arrival] if self._next_arrival < len(self.requests) else []
        if self._delayed:
            times.append(self._delayed[0][0])
        if not times:
            if self.waiting:
                raise AssertionError(f"{len(self.waiting)} requests wait for an idle cluster: a placement can never be granted")
            return False
        self.clock = max(self.clock, min(times))
        return True

    def _admit_arrivals(self) -> None:
        requests, clock = self.requests, self.clock
        while self._next_arrival < len(requests) and requests[self._next_arrival].arrival <= clock:
            self._place(requests[self._next_arrival])
            self._next_arrival += 1
        while self._delayed and self._delayed[0][0] <= clock:
            self._place(requests[heapq.heappop(self._delayed)[1]])

    def _place(self, request: SimulatedRequest) -> None:
        settings = self.settings
        expected = max(1, round(self._estimate_total / self._estimate_count) - request.decoded)
        wanted = PlacementRequest(request.prompt + request.decoded, expected, max(1, settings.max_new_tokens - request.decoded))
        try:
            placement = self.policy.place(wanted, self.cluster.loads, settings.page_size)
        except CapacityError:
            self.recorder.num_rejected += 1
            return
        request.queued = request.ready
        self.cluster.promise(request, placement)
        self.waiting.append(request)
        if request.retractions:
            self.waiting.sort(key=lambda other: other.identity)
        else:
            request.start_degree = placement.degree
        self._changed = True

    def _grant(self) -> None:
        """All-or-nothing reservations in the total order. What a waiting request was promised counts as taken for those behind it,
        and a home serves its own queue in order (unless `admission` says otherwise)."""
        if not self.waiting:
            self._changed = False
            return
        free, max_running, pool_pages = self.cluster.free_pages, self.settings.max_running, self.cluster.pool_pages
        guest_room = self.cluster.guest_room
        promised = promised_to_growth(self.stalled, self.limits)
        promised_guests = [0] * self.settings.num_instances
        blocked: set[int] = set()
        still = []
        in_prefill = [len(queue) for queue in self._prefilling]
        order = self.settings.admission
        for request in self.waiting:
            home, tail = request.home, request.tail
            granted = home not in blocked and self.cluster.batch[home] + in_prefill[home] < max_running
            if granted:
                for rank, pages in request.pages.items():
                    is_short = free[rank] - self._left_to_growth(free[rank]) - promised[rank] < min(pages + (rank == tail), pool_pages)
                    if is_short or (rank != home and guest_room[rank] - promised_guests[rank] < pages):
                        granted = False
                        break
            if granted:
                self._start(request)
                in_prefill[home] = len(self._prefilling[home])
            else:
                if order != "any":
                    blocked.update((home,) if order == "home" else range(self.settings.num_instances))
                    for rank, pages in request.pages.items():
                        promised[rank] += pages + (rank == tail)
                        promised_guests[rank] += pages if rank != home else 0
                still.append(request)
        self.waiting = still
        self._changed = False

    def _left_to_growth(self, free: int) -> int:
        return self.limits.left_to_growth(free) if self.settings.grows else 0

    def _start(self, request: SimulatedRequest) -> None:
        request.wait += self.clock - request.queued
        self.cluster.take_pages(request)
        if self.settings.prefill == "same":
            request.prefill_left = request.prompt + request.decoded
            self._prefilling[request.home].append(request)
            self._num_prefilling += 1
        else:
            self._begin_decode(request)

    def _begin_decode(self, request: SimulatedRequest) -> None:
        if request.admitted < 0:
            request.admitted = self.clock
        self.num_running += 1
        self.cluster.start_rows(request, self.step)
        self._schedule(request)

    def _schedule(self, request: SimulatedRequest) -> None:
        """Books the step before which the request is done or its tail page is full."""
        request.finish_step = self.step + request.output - request.decoded
        self._finishing.setdefault(request.finish_step, []).append(request)
        room = request.pages[request.tail] * self.settings.page_size - request.tokens[request.tail]
        request.page_step = self.step + room
        if request.page_step < request.finish_step:
            self._page_full.setdefault(request.page_step, []).append(request)

    # One step

    def _run_step(self) -> None:
        step = self.step
        for request in self._page_full.pop(step, ()):
            if request.page_step == step and request.finish_step > step:
                self._grow(request)
        moving = 0.0
        if self.settings.moves and self.num_running:
            moving = move_pages(self.cluster, self.cost, self.recorder, page_size=self.settings.page_size, step=self.step)
        duration = self._step_seconds() + moving
        cluster = self.cluster
        self.recorder.record_step(self.clock, duration, cluster.kv_tokens, cluster.batch, self.num_running)
        self.clock += duration
        self.step = step + 1
        cluster.kv_tokens += cluster.tails
        for request in self._finishing.pop(step + 1, ()):
            if request.finish_step == step + 1:
                self._finish(request)
        if self._ended_prefill:
            for request in self._ended_prefill:
                self._begin_decode(request)
            self._ended_prefill = []
        if self._step_hook is not None:
            self._step_hook(self)

    def _step_seconds(self) -> float:
        microseconds = decode_us(self.cluster, self.cost, self.num_running)
        if self._num_prefilling:
            chunks_us, self._ended_prefill = run_chunks(self._prefilling, self.settings.chunk_tokens, self.cost)
            self._num_prefilling -= len(self._ended_prefill)
            microseconds += chunks_us
        return microseconds * 1e-6

    def _finish(self, request: SimulatedRequest) -> None:
        cluster = self.cluster
        cluster.stop_rows(request, self.step)
        request.end_degree = len(request.pages)
        cluster.release(request)
        request.finish = self.clock
        request.finish_step = request.page_step = -1
        self.num_running -= 1
        self._estimate_total += request.output
        self._estimate_count += 1
        self.recorder.num_finished += 1
        self._changed = True

    # Growth and shortage

    def _grow(self, request: SimulatedRequest) -> None:
        cluster, home = self.cluster, request.home
        if request.tail == home and cluster.free_pages[home] > 0:
            # Cluster.add_page for the common case; called once per page of every request.
            size = self.settings.page_size
            cluster.free_pages[home] -= 1
            cluster.loads[home].kv_tokens += size
            request.pages[home] += 1
            request.page_step += size
            if request.page_step < request.finish_step:
                self._page_full.setdefault(request.page_step, []).append(request)
            return
        cluster.stop_rows(request, self.step)
        self.num_running -= 1
        request.finish_step = request.page_step = -1
        self._resume(request)

    def _retry_stalled(self) -> None:
        """In order; then whoever yields (policy/growth.py) starts over."""
        retry, self.stalled = sorted(self.stalled, key=order_of), []
        for request in retry:
            self._resume(request)
        stuck = {order_of(request): request for request in self.stalled}
        victim = choose_victim(list(stuck), somebody_gets_on=bool(self.num_running or self._num_prefilling)) if stuck else None
        if victim is not None:
            self._retract(stuck[victim])

    def _resume(self, request: SimulatedRequest) -> None:
        """Gives a request without room on its tail a page and puts it back; without one it stalls. Where nothing grows, SGLang retracts the
        youngest of the instance at once."""
        rank = tail_with_room(self.cluster, request, self.limits, self.cost, grows=self.settings.grows)
        if rank is None and not self.settings.grows:
            full = request.home if request.home in request.pages else request.tail
            self._retract(youngest_on(self.cluster, full, request, self.stalled))
            if not request.pages:
                return
            rank = tail_with_room(self.cluster, request, self.limits, self.cost, grows=self.settings.grows)
        if rank is None:
            self.stalled.append(request)
            self._changed = True
            return
        if rank not in request.pages:
            self.recorder.num_growths += 1
        self.cluster.add_page(request, rank)
        request.tail = rank
        self.num_running += 1
        self.cluster.start_rows(request, self.step)
        self._schedule(request)

    def _retract(self, victim: SimulatedRequest) -> None:
        """Frees the victim's pages; it comes back with its tokens as prompt once they are computed again."""
        cluster = self.cluster
        if victim.finish_step >= 0:
            cluster.stop_rows(victim, self.step)
            self.num_running -= 1
        else:
            self.stalled = [other for other in self.stalled if other is not victim]
        victim.finish_step = victim.page_step = -1
        cluster.release(victim)
        victim.retractions += 1
        self.recorder.num_retractions += 1
        self._changed = True
        delay = 0.0
        if self.settings.prefill == "elsewhere":
            delay = (victim.prompt + victim.decoded) * self.cost.prefill_us_per_token * 1e-6
        victim.ready = self.clock + delay
        heapq.heappush(self._delayed, (victim.ready, victim.identity))
