"""Captured decode steps of several instances on one GPU: random joins, leaves and growth against attention over the whole sequence.

The protocol model moves requests and pages as in a server; every decode step with sharded rows is replayed from graphs captured ahead of
time, one per instance, as streams of this process, and run once more without a graph: both must give the same bits.

FlashInfer's MLA kernel is launched cooperatively: it needs every multiprocessor at once. Where instances share a GPU and a process, the
kernels of one that waits for another would keep it from starting, so MLA takes a GPU per instance here (runtime_check.py runs it on one,
as processes, which the GPU serves in turns). FlashMLA's kernel is launched as any other, and runs here on one GPU too.
"""

from __future__ import annotations

import os

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # a hardware queue per stream, or one instance waits behind another

import numpy as np
import pytest
import torch

from sglang_dcp.dataflow.attention.paged_attention import AttentionShape
from sglang_dcp.dataflow.contracts import NO_SCALES, KVScales, NewKV
from sglang_dcp.dataflow.graph.route_words import guests_per_instance
from sglang_dcp.dataflow.quantised_kv import with_quantised
from sglang_dcp.dataflow.reference import partial_attention
from sglang_dcp.dataflow.step_mode import STOCK, Graph
from sglang_dcp.dataflow.transport.base import TransportError
from sglang_dcp.upstream.layers.graphs import GraphEngine
from sglang_dcp.upstream.layers.peers import Place
from test.unit.dataflow.cluster import PoolCache, as_bytes
from test.unit.test_decode_session import Session
from testing.captures import capturing

pytestmark = pytest.mark.gpu
pytest.importorskip("flashinfer")
pytest.importorskip("sgl_kernel_dcp")
if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("no Hopper GPU on this machine", allow_module_level=True)

FP8 = torch.float8_e4m3fn
HOME_ROWS, GUEST_ROWS, CONTEXT_PAGES = 8, (4, 16), 64
WINDOW = 37  # longer than two pages of 16, so that several instances hold a part
MOST_LINES = 2048  # of the token table: requests of a session


class Instance:
    """One instance's graphs and static inputs."""

    def __init__(self, session: GpuSession, rank: int) -> None:
        from sglang_dcp.dataflow.graph.graph_attention import GraphAttention, GraphSizes

        latent, page_size, self.device, self.session = session.latent, session.page_size, session.devices[rank], session
        sizes = GraphSizes(session.num_instances, HOME_ROWS, GUEST_ROWS, page_size, CONTEXT_PAGES, session.num_pages + 1)
        heads = session.heads, session.kv_heads, session.qk_dim, session.v_dim
        shape = AttentionShape(*heads, torch.bfloat16, session.qk_dim**-0.5, latent, quantised=FP8 if session.quantised else None)
        sharing = session.devices.count(self.device)
        with torch.cuda.device(self.device):
            self.attention = GraphAttention(
                rank,
                sizes,
                shape,
                self.device,
                num_sharing=sharing,
                wait_seconds=session.wait_seconds,
                kernel=session.graph_kernel,
                windows=() if session.window is None else (session.window,),
            )
            self.stream = torch.cuda.Stream()
        like = {"dtype": torch.bfloat16, "device": self.device}
        self.sinks = None if session.sinks is None else session.sinks.bfloat16().to(self.device)
        self.queries = torch.zeros(HOME_ROWS, session.heads, session.qk_dim, **like)
        width = session.kv_heads * session.qk_dim
        self.kv = torch.zeros(HOME_ROWS, 1, width + (0 if latent else session.kv_heads * session.v_dim), **like).to(session.kv_dtype)
        self.split = session.v_dim if latent else width
        self.cache = session.caches[rank]
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.token_table = torch.zeros(MOST_LINES, CONTEXT_PAGES * page_size, dtype=torch.int32, device=self.device)

    def run(self, guest_rows: int) -> torch.Tensor:
        self.attention.begin(HOME_ROWS, guest_rows, self.token_table)
        keys, values = self.kv[..., : self.split], self.kv[..., self.split :]
        pools = self.cache.keys, self.cache.keys if self.cache.latent else self.cache.values
        layer = HOME_ROWS, guest_rows, (self.queries, None), keys, values, pools, self.session.kv_scales
        if self.session.window is not None:
            self.attention.run(*layer)  # a layer of all keys stands before each of a window
        return self.attention.run(*layer, window=self.session.window, sinks=self.sinks)

    def capture(self, guest_rows: int) -> None:
        with torch.cuda.device(self.device):
            self.attention.prepare(HOME_ROWS, guest_rows)
            self.run(guest_rows)
            torch.cuda.synchronize()
            self.graphs[guest_rows] = torch.cuda.CUDAGraph()
            with capturing(self.graphs[guest_rows], stream=self.stream):
                self.run(guest_rows)


class GpuSession(Session):
    """A session in the kernels' sizes, bfloat16. kernel: gqa, gqa_fp8 (pools of float8_e4m3fn, scales that are not 1), mla (all
    FlashInfer), fa3 or fa3_fp8 (GQA), fa3_window or fa3_window_fp8 (layers of a window, with sinks, behind others; heads of 64),
    flashmla or flashmla_fp8 (without scales). spread: a GPU per instance, else all on one."""

    wait_seconds = 20.0

    def __init__(self, seed: int, num_instances: int, num_pages: int, page_size: int, *, kernel: str, spread: bool) -> None:
        latent, self.quantised = kernel.startswith(("mla", "flash")), kernel.endswith("fp8")
        self.graph_kernel = next((name for name in ("flashmla", "fa3") if kernel.startswith(name)), "flashinfer")
        self.kv_dtype = FP8 if self.quantised else torch.bfloat16
        self.kv_scales = KVScales(0.5, 2.0) if self.quantised and not latent else NO_SCALES
        # These kernels over such pools work on queries and on weights of the keys with three bits behind the point.
        self.query_dtype, self.tolerance = (
            (FP8, 8e-2) if kernel in ("flashmla_fp8", "fa3_fp8", "fa3_window_fp8") else (torch.bfloat16, 2e-2)
        )
        super().__init__(seed, num_instances, num_pages, page_size, latent=latent)
        dim = 64 if "window" in kernel else 128
        self.heads, self.kv_heads, self.qk_dim, self.v_dim = (16, 1, 576, 512) if latent else (8, 2, dim, dim)
        if "window" in kernel:
            self.window, self.sinks = WINDOW, torch.linspace(-2.0, 4.0, self.heads)
        slots = (num_pages + 1) * page_size
        self.devices = [torch.device("cuda", rank if spread else 0) for rank in range(num_instances)]
        for here in self.devices:
            for there in self.devices:
                torch.zeros(1, device=here).to(there)  # lets torch open the way between the two
        self.caches = []
        for device in self.devices:
            cache = PoolCache(1, self.kv_heads, self.qk_dim, self.v_dim, latent)
            cache.keys = torch.full((slots, self.kv_heads, self.qk_dim), 7.0, dtype=torch.bfloat16, device=device).to(self.kv_dtype)
            cache.values = torch.full((slots, self.kv_heads, self.v_dim), 7.0, dtype=torch.bfloat16, device=device).to(self.kv_dtype)
            self.caches.append(cache)
        self.instances = [Instance(self, rank) for rank in range(num_instances)]
        addresses = [instance.attention.exchange.address for instance in self.instances]
        for instance in self.instances:
            instance.attention.exchange.connect(addresses)
        for guest_rows in GUEST_ROWS:
            for instance in self.instances:
                instance.capture(guest_rows)
        self.engine = GraphEngine(GUEST_ROWS, [Place("host", "gpu", ("gpu",))] * num_instances, 0, self.layout, None)
        self.engine.max_home_rows = HOME_ROWS
        self.num_graph_steps = self.num_advances = 0
        self.worst = 0.0

    def randn(self, *shape: int) -> torch.Tensor:
        return super().randn(*shape).bfloat16().cuda()

    def run_batches(self) -> None:
        extends = any(num_new > 1 for home in self.homes for _, _, num_new in home.batch)
        told = self.homes[0].participant.rows_of
        needed = max(guests_per_instance([[row.route for row in rows] for rows in told], self.layout.groups))
        fits = needed <= GUEST_ROWS[-1] and all(len(home.batch) <= HOME_ROWS for home in self.homes)
        is_graph = not extends and self.homes[0].participant.num_sharded_rows > 0 and fits
        self.write_kv(is_graph)
        if not is_graph:
            for home in self.homes:
                home.runtime.mode = STOCK
            return
        self.num_graph_steps += 1
        for rank in range(self.num_instances):
            self.load(rank)
        guest_rows = self.homes[0].runtime.mode.guest_rows
        replayed = self.exchange(lambda instance: instance.graphs[guest_rows].replay())
        again = self.exchange(lambda instance: instance.run(guest_rows))
        for rank, home in enumerate(self.homes):
            rows = len(home.batch)
            assert not self.instances[rank].attention.exchange.silent_peers()
            assert torch.equal(replayed[rank][:rows], again[rank][:rows]), "a replay differs from the same step without a graph"
            self.compare_rows(home, self.instances[rank].queries.cuda(), replayed[rank].cuda())

    def exchange(self, run) -> list[torch.Tensor]:
        self.synchronize()
        for instance in self.instances:
            with torch.cuda.stream(instance.stream):
                run(instance)
        self.synchronize()
        return [instance.attention.merged.clone() for instance in self.instances]

    def synchronize(self) -> None:
        for device in set(self.devices):
            torch.cuda.synchronize(device)

    def load(self, rank: int) -> None:
        with torch.cuda.device(self.devices[rank]):
            self.load_here(rank)

    def load_here(self, rank: int) -> None:
        home, instance = self.homes[rank], self.instances[rank]
        runtime, sizes = home.runtime, [len(other.batch) for other in self.homes]
        steady = home.participant.rows_steady and runtime.own_batch.steady
        mode = self.engine.choose_step(runtime.mode, runtime.rows, sizes, steady=steady)
        assert mode is not None
        runtime.mode, step = mode, mode.step
        self.num_advances += step.is_advance
        table = np.zeros(instance.token_table.shape, dtype=np.int32)
        for line, req in home.rows_by_slot.items():
            pages = np.array(req.listed_pages, dtype=np.int32)
            table[line, : len(pages) * self.page_size : self.page_size] = pages * self.page_size
        instance.token_table.copy_(torch.from_numpy(table))
        if step.is_advance:
            instance.attention.advance(step.step, instance.token_table)
        else:
            instance.attention.fill(step.step, step.words, step.rows, instance.token_table)
        instance.attention.plan(HOME_ROWS, mode.guest_rows)
        instance.queries.normal_()
        for row, (req, prefix_len, _) in enumerate(home.batch):
            stored = self.stored(req, slice(prefix_len, prefix_len + 1))
            parts = [as_bytes(part).flatten() for part in stored.travelling]
            as_bytes(instance.kv)[row, 0] = torch.cat(parts)

    def write_kv(self, is_graph: bool) -> None:
        """New tokens' K/V where their pages lie, but for those that travel in a graph step: the exchange writes them."""
        for rank, home in enumerate(self.homes):
            for req, prefix_len, num_new in home.batch:
                for position in range(prefix_len, prefix_len + num_new):
                    index, offset = divmod(position, self.page_size)
                    owner, number = (rank, req.pages[index]) if req.dyncp is None else self.page_of(req, index)
                    travels = is_graph and owner != rank
                    stored = self.stored(req, slice(position, position + 1))
                    rows = [part.to(self.devices[owner]) for part in (stored.keys, stored.values)]
                    slot = torch.tensor([number * self.page_size + offset], device=self.devices[owner])
                    rows = [torch.full_like(row.bfloat16(), 7.0).to(row.dtype) for row in rows] if travels else rows
                    self.caches[owner].write(slot, NewKV(*rows, self.latent))

    def stored(self, req, span: slice) -> NewKV:
        """As it lies in a pool."""
        keys, values = (part[span] for part in self.kv_of(req))
        return with_quantised(NewKV(keys, values, self.latent), self.kv_scales, self.kv_dtype).stored

    @staticmethod
    def page_of(req, index: int) -> tuple[int, int]:
        page = req.dyncp.pages[index]
        return page.owner, page.number

    def compare_rows(self, home, queries: torch.Tensor, output: torch.Tensor) -> None:
        for row, (req, prefix_len, _) in enumerate(home.batch):
            stored = self.stored(req, slice(0, prefix_len + 1))
            keys, values = stored.keys.float() * self.kv_scales.key, stored.values.float() * self.kv_scales.value
            asked = queries[row : row + 1].to(self.query_dtype).float()
            first = 0 if self.window is None else max(0, prefix_len - self.window)
            state = partial_attention(asked, keys[first:], values[first:], scale=self.qk_dim**-0.5)
            expected = state.output
            if self.sinks is not None:
                expected = expected * torch.sigmoid(state.lse - self.sinks.to(state.lse.device)).unsqueeze(-1)
            self.worst = max(self.worst, float((output[row : row + 1].float() - expected.float()).abs().max()))
            torch.testing.assert_close(output[row : row + 1].float(), expected.float(), atol=self.tolerance, rtol=self.tolerance)


CASES = [
    (2, 16, "gqa"),
    (4, 16, "gqa"),
    (2, 16, "gqa_fp8"),
    (2, 16, "fa3"),
    (2, 64, "fa3_fp8"),
    (2, 16, "fa3_window"),
    (2, 64, "fa3_window_fp8"),
    (2, 64, "mla"),
    (2, 64, "flashmla"),
    (2, 64, "flashmla_fp8"),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("num_instances", "page_size", "kernel"), CASES)
def test_a_thousand_steps_of_joins_leaves_and_growth(num_instances: int, page_size: int, kernel: str) -> None:
    if kernel == "mla" and torch.cuda.device_count() < num_instances:
        pytest.skip("FlashInfer's MLA takes a GPU per instance here, see above")
    if kernel.startswith("flashmla"):
        pytest.importorskip("flash_mla")
    session = GpuSession(7, num_instances, 10, page_size, kernel=kernel, spread=torch.cuda.device_count() >= num_instances)
    target = 1000 if num_instances == 2 else 250
    while session.num_graph_steps < target and session.num_steps < 6000:
        if session.random.random() < 0.2 and sum(len(home.waiting_queue) for home in session.homes) < 5:
            session.arrive_at_random()
        if session.random.random() < 0.01:
            session.abort_at_random()
        session.step()
    session.close()
    assert session.num_advances > target
    print(f"{session.num_graph_steps} of {session.num_steps} steps as graphs, worst difference {session.worst:.4f}")
    assert session.num_graph_steps >= target
    for instance in session.instances:
        instance.attention.exchange.close()


def test_a_silent_peer_is_in_the_note_of_the_step_that_missed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step before has a clean note, though it is read when the next one has been launched, as with overlap scheduling."""
    monkeypatch.setattr(GpuSession, "wait_seconds", 2.0)
    session = GpuSession(7, 2, 10, 16, kernel="gqa", spread=torch.cuda.device_count() >= 2)
    while session.num_graph_steps < 5 or not isinstance(session.homes[0].runtime.mode, Graph):
        if session.random.random() < 0.2 and sum(len(home.waiting_queue) for home in session.homes) < 5:
            session.arrive_at_random()
        session.step()
        assert session.num_steps < 2000
    guest_rows, notes = session.homes[0].runtime.mode.guest_rows, []

    def replay(instance: Instance) -> None:
        with torch.cuda.device(instance.device), torch.cuda.stream(instance.stream):
            instance.graphs[guest_rows].replay()
            notes.append((instance.attention, instance.attention.note_silence(len(notes))))

    for instance in (*session.instances, session.instances[0]):  # the other one does not come to the second step
        replay(instance)
    session.synchronize()
    session.close()
    for attention, note in notes[:2]:
        attention.raise_if_silent(note)
    attention, missed = notes[2]
    with pytest.raises(TransportError, match=r"rank 0, step 2, peer memory: instances \[1\] did not answer within 2 s"):
        attention.raise_if_silent(missed)
    for instance in session.instances:
        instance.attention.exchange.close()
