"""Instances of one process that decode together: the code that serves (StepDriver, ledger, page lines, tables), around stand-ins for SGLang
and for what runs on a GPU. The exchange between instances is a list that all of them are handed."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from benchmark.host_step.stand_ins import GUEST_ROWS, Batch, HostAttention, ModelRequest, make_pool
from sglang_dcp.config import DynCpConfig
from sglang_dcp.ledger.page_ids import Page
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.policy.split_limits import Layout
from sglang_dcp.upstream.layers import step_path
from sglang_dcp.upstream.layers.graphs import GraphEngine
from sglang_dcp.upstream.layers.peers import Place
from sglang_dcp.upstream.step import sync
from sglang_dcp.upstream.step.driver import StepDriver
from sglang_dcp.upstream.step.runtime import Runtime, cluster_of

STOCK_COLUMNS = 11
PAGE_SIZE = 64


def neighbour(batch: Batch) -> None:
    """What a scheduler does beside us: interpreter, torch's small tensors and the batch's lengths get into the caches."""
    facts = torch.tensor([len(batch.reqs), 1, 0, 2, *range(7)], dtype=torch.int64).view(1, -1)
    rows = facts.repeat(2, 1)[:, :4]
    assert rows[:, 0].tolist() and bool(rows[:, 1].min()) and [part.shape for part in batch.seq_lens_cpu.split(64)]


class Instance:
    """One home: its requests and the driver of its steps."""

    def __init__(self, rank: int, num_instances: int, num_pages: int, max_rows: int) -> None:
        self.rank, self.num_instances = rank, num_instances
        config, self.pool = DynCpConfig().resolve(num_instances), make_pool(num_pages, PAGE_SIZE)
        self.participant = Participant(cluster_of(config, num_instances, num_pages, PAGE_SIZE), rank, self.pool)
        self.pool.bind(self.participant, SimpleNamespace(supports_prefix_sharing=lambda: False, evictable_size=lambda: 0))
        places, layout = [Place("host", "gpu", ("gpu",))] * num_instances, Layout(num_instances, num_instances)
        engine = GraphEngine((GUEST_ROWS,), places, rank, layout, None)
        engine.max_home_rows = max_rows
        engine.attention = HostAttention(rank, num_instances, max_rows, PAGE_SIZE, num_pages)
        self.batch = Batch([])
        self.token_table = torch.zeros(4 * max_rows, 64 * PAGE_SIZE, dtype=torch.int32)
        self.scheduler = SimpleNamespace(
            running_batch=self.batch,
            waiting_queue=[],
            chunked_req=None,
            is_fully_idle=lambda: False,
            result_queue=[],
            _reqs_finishing_inflight=lambda batch: [],
            req_to_token_pool=SimpleNamespace(req_to_token=self.token_table),
            tree_cache=SimpleNamespace(disable=False),
        )
        self.runtime = Runtime(self.scheduler, config, self.participant, self.pool, None, None, engine)  # type: ignore[arg-type]
        self.driver = StepDriver(self.runtime)
        self.row = torch.zeros(STOCK_COLUMNS, dtype=torch.int64)
        self.last = torch.zeros(max_rows, dtype=torch.int32)
        self.next_line = 0
        self.told = self.row

    def add(self, length: int) -> ModelRequest:
        """A request of `length` tokens at the end of the batch."""
        req = ModelRequest(self.next_line % len(self.token_table), length)
        self.next_line += 1
        self.batch.append(req)
        return req

    def schedule(self) -> None:
        """From the round's beginning to the row of the all-gather."""
        batch, driver = self.batch, self.driver
        neighbour(batch)
        driver.rejoin(batch)
        driver.secure(batch)
        batch.seq_lens_cpu = batch.seq_lens_cpu + 1
        rows = len(batch.reqs)
        if driver.allocate(batch, batch.seq_lens_cpu, self.last[:rows]) is None:
            begin = sum(req.kv.kv_allocated_len % PAGE_SIZE == 0 for req in batch.reqs)
            self.pool.free_pages = self.pool.free_pages[begin:]
        for req in batch.reqs:
            req.kv.kv_allocated_len += 1
        neighbour(batch)
        driver.batch = batch
        self.told = driver.tell(self.row)

    def run(self, gathered: torch.Tensor, sizes: list[int]) -> None:
        """From the columns of all to the end of the step."""
        info = SimpleNamespace(tp0_info_cpu=gathered, global_num_tokens=sizes, num_tokens=sizes[self.rank], can_run_decode_cuda_graph=True)
        neighbour(self.batch)
        self.driver.settle(info)
        neighbour(self.batch)
        self.driver.launch(SimpleNamespace(batch_size=len(self.batch.reqs)), as_graph=True)
        self.driver.account(SimpleNamespace(can_run_cuda_graph=True))


class Scene:
    """num_instances homes of `rows` requests each, the first `sharded` of them with the first half of their pages on the next one."""

    def __init__(self, num_instances: int, rows: int, sharded: int, prompt: int) -> None:
        num_pages = 200_000 // PAGE_SIZE
        self.instances = [Instance(rank, num_instances, num_pages, max_rows=rows + 64) for rank in range(num_instances)]
        self.words: list[list[int]] = []
        sync.exchange_words = self._exchange_words  # type: ignore[assignment]
        step_path.note_silence = lambda *args: None
        for home in self.instances:
            for index in range(rows):
                self.join(home, prompt + index * PAGE_SIZE // rows, sharded=index < sharded)

    def join(self, home: Instance, length: int, *, sharded: bool) -> None:
        pages = -(-length // PAGE_SIZE)
        if not sharded:
            home.add(length)
            assert home.pool.take_pages(pages) is not None
            return
        req, half, other = home.add(length), pages // 2, self.instances[(home.rank + 1) % len(self.instances)]
        req.dyncp = home.participant.open_request()
        req.dyncp.owner = req
        there, here = other.pool.take_pages(half), home.pool.take_pages(pages - half)
        assert there is not None and here is not None
        other.participant.guests.lend(home.rank, req.dyncp.handle, 0, there)
        home.participant.homes.adopt(req.dyncp, [*(Page(other.rank, n) for n in there), *(Page(home.rank, n) for n in here)], 0)

    def leave(self, home: Instance, place: int) -> bool:
        """The request at this place of the batch ends. Whether it was sharded."""
        req = home.batch.remove(place)
        if req.dyncp is None:
            return False
        home.participant.release(req.dyncp)
        return True

    def step(self) -> None:
        for home in self.instances:
            home.schedule()
        self.words = [list(home.participant.own_words) for home in self.instances]
        gathered, sizes = torch.stack([home.told for home in self.instances]), [len(home.batch.reqs) for home in self.instances]
        for home in self.instances:
            home.run(gathered, list(sizes))

    def _exchange_words(self, runtime: Any, counts: Sequence[int], most: int) -> list[list[int]]:
        return self.words
