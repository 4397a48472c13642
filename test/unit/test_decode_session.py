"""Whole sessions: N instances with real K/V pools, joins, leaves, chunks, growth, sitting out and page reuse; every step against attention
over the whole sequence."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from sglang_dcp.dataflow.attention.partial_attention import torch_partial_attention
from sglang_dcp.dataflow.attention_step import attention_step
from sglang_dcp.dataflow.contracts import NewKV, StepPlan
from sglang_dcp.dataflow.reference import partial_attention
from test.unit.dataflow.cluster import PoolCache, ThreadTransport
from testing.protocol.fakes import ModelRequest
from testing.protocol.model import ProtocolModel
from testing.protocol.scheduler import ModelScheduler

HEADS = 4


class Session(ProtocolModel):
    """The protocol model, whose steps run one attention layer on every instance. window: of the layer; sinks: its logits, by head."""

    window: int | None = None
    sinks: torch.Tensor | None = None

    def __init__(
        self, seed: int, num_instances: int, num_pages: int, page_size: int, *, latent: bool, num_nodes: int = 1, scope: str = "node"
    ) -> None:
        super().__init__(seed, num_instances, num_pages, page_size, chunk_tokens=3 * page_size // 2, num_nodes=num_nodes, scope=scope)
        self.layout = self.homes[0].participant.limits.layout
        self.latent = latent
        self.kv_heads, self.qk_dim, self.v_dim = (1, 12, 8) if latent else (2, 8, 8)
        slots = (num_pages + 1) * page_size
        self.caches = [PoolCache(slots, self.kv_heads, self.qk_dim, self.v_dim, latent) for _ in range(num_instances)]
        transports = [(group, ThreadTransport(len(group))) for group in self.layout.groups]
        self.endpoints = [transport.of(place) for group, transport in transports for place in range(len(group))]
        self.plans: list[StepPlan] = [None] * num_instances  # type: ignore[list-item]
        self.threads = ThreadPoolExecutor(num_instances)
        self.torch_rng = torch.Generator().manual_seed(seed)
        self.keys: dict[str, torch.Tensor] = {}
        self.values: dict[str, torch.Tensor] = {}
        self.num_sharded_steps = self.num_rows = self.num_mixed_steps = self.num_steps_without_return = self.num_steps_of_one_node = 0

    def close(self) -> None:
        self.threads.shutdown()

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.torch_rng)

    def run_batches(self) -> None:
        """The step's layer, after messages and grants as in a server."""
        instances = [home.participant for home in self.homes]
        modes = {num_new > 1 for home in self.homes for _, _, num_new in home.batch[:1]}
        self.num_sharded_steps += instances[0].num_sharded_rows > 0
        self.num_mixed_steps += instances[0].num_sharded_rows > 0 and len(modes) == 2
        self.num_steps_of_one_node += 0 < len(instances[0].busy_ranks) < self.num_instances
        for group in self.layout.groups:
            self.run_eagerly(group)

    def run_eagerly(self, group: range) -> None:
        """The layer of one exchange group. No other group is there: each could run at another time."""
        inputs = [self.tokens_of(self.homes[rank]) for rank in group]
        outputs = list(self.threads.map(self.run_layer, group, inputs))
        asked = {self.plans[rank].anybody_asks for rank in group}
        assert len(asked) == 1, "instances disagree about a collective"
        self.num_steps_without_return += group.start in self.homes[0].participant.busy_ranks and not asked.pop()
        for rank, (queries, _), output in zip(group, inputs, outputs, strict=True):
            self.compare(self.homes[rank], queries, output)

    def tokens_of(self, home: ModelScheduler) -> tuple[torch.Tensor, NewKV]:
        """Queries and K/V rows of the batch; a home without tokens takes part with a dummy one."""
        rows = [[part[prefix_len : prefix_len + num_new] for part in self.kv_of(req)] for req, prefix_len, num_new in home.batch]
        rows = rows or [[self.randn(1, self.kv_heads, self.qk_dim), self.randn(1, self.kv_heads, self.v_dim)]]
        keys, values = (torch.cat(parts) for parts in zip(*rows, strict=True))
        new_kv = NewKV(keys, keys[..., : self.v_dim] if self.latent else values, self.latent)
        return self.randn(len(keys), HEADS, self.qk_dim), new_kv

    def kv_of(self, req: ModelRequest) -> tuple[torch.Tensor, torch.Tensor]:
        if req.rid not in self.keys:
            length = len(req.origin_input_ids) + req.max_new_tokens
            self.keys[req.rid] = self.randn(length, self.kv_heads, self.qk_dim)
            self.values[req.rid] = self.keys[req.rid][..., : self.v_dim] if self.latent else self.randn(length, self.kv_heads, self.v_dim)
        return self.keys[req.rid], self.values[req.rid]

    def run_layer(self, rank: int, tokens: tuple[torch.Tensor, NewKV]) -> torch.Tensor:
        home, (queries, new_kv) = self.homes[rank], tokens
        rows = home.runtime.rows
        local_pages = [np.array(req.pages) for req, _, _ in home.batch if req.dyncp is None]
        plan = self.plans[rank] = rows.build_plan(rows.home_rows(local_pages), len(queries), self.window)
        given = {"scale": self.qk_dim**-0.5, "layer": 0, "sinks": self.sinks}
        return attention_step(queries, new_kv, plan, self.caches[rank], torch_partial_attention, self.endpoints[rank], **given)

    def compare(self, home: ModelScheduler, queries: torch.Tensor, output: torch.Tensor) -> None:
        start = 0
        for req, prefix_len, num_new in home.batch:
            length, span = prefix_len + num_new, slice(start, start + num_new)
            positions = torch.arange(length)
            state = partial_attention(
                queries[span],
                self.keys[req.rid][:length],
                self.values[req.rid][:length],
                scale=self.qk_dim**-0.5,
                query_positions=positions[prefix_len:],
                key_positions=positions,
                window=self.window,
            )
            expected = state.output if self.sinks is None else state.output * torch.sigmoid(state.lse - self.sinks).unsqueeze(-1)
            torch.testing.assert_close(
                output[span], expected, atol=1e-5, rtol=1e-5, msg=lambda text, r=req: f"step {self.num_steps}, {r.rid}: {text}"
            )
            self.num_rows += req.dyncp is not None
            start += num_new


CASES = [(2, 8, 4, False), (3, 10, 8, True), (4, 8, 16, False)]
"""num_instances, num_pages, page_size, latent."""


def drive(session: Session) -> None:
    """250 steps of random arrivals and aborts, then until everything has ended."""
    for _ in range(250):
        if session.random.random() < 0.25 and sum(len(home.waiting_queue) for home in session.homes) < 5:
            session.arrive_at_random()
        if session.random.random() < 0.02:
            session.abort_at_random()
        session.step()
    session.drain(5_000)
    session.close()


def take_turns(session: Session) -> None:
    """Long requests take turns on the same full pools beside a short one that decodes: no page may be read through a stale table."""
    session.arrive(1, 6, 30)
    for turn in range(6):
        session.arrive(turn % 2, 24, 5, (1 - turn % 2, turn % 2))
    session.drain(2_000)
    session.close()


@pytest.fixture(autouse=True)
def one_thread_per_instance():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("num_instances", "num_pages", "page_size", "latent"), CASES)
def test_session_of_random_requests(num_instances, num_pages, page_size, latent):
    session = Session(6, num_instances, num_pages, page_size, latent=latent)
    drive(session)
    assert session.num_sharded_steps > 100
    assert session.num_mixed_steps > 10
    assert session.num_steps_without_return >= 3
    assert sum(session.num_growths) > 5


@pytest.mark.parametrize("window", [2, 11])
def test_session_of_window_layers_with_sinks(window):
    session = Session(5, 3, 10, 4, latent=False)
    session.window, session.sinks = window, torch.tensor([0.0, 2.0, -2.0, 5.0])
    drive(session)
    assert session.num_sharded_steps > 100 and session.num_mixed_steps > 10


@pytest.mark.parametrize(("scope", "latent"), [("node", False), ("node", True), ("cluster", False)])
def test_nodes_exchange_rows_each_by_itself(scope, latent):
    """Two nodes of two; under scope cluster all four are one group."""
    session = Session(8, 4, 10, 8, latent=latent, num_nodes=2, scope=scope)
    drive(session)
    assert session.num_sharded_steps > 100 and sum(session.num_growths) > 5
    assert (session.num_steps_of_one_node > 20) == (scope == "node")


@pytest.mark.parametrize("latent", [False, True])
def test_pages_are_reused_right_after_a_release(latent):
    session = Session(4, 2, 6, 4, latent=latent)
    take_turns(session)
    assert session.num_rows > 30
