"""The GPU's attention path on the CPU (spans, page lists, plans, the calls into FlashInfer) against attention over the whole sequence."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from sglang_dcp.dataflow import device_plan
from sglang_dcp.dataflow.attention import flashinfer_step as adapters
from sglang_dcp.dataflow.attention.kernel_table import kernel_table
from sglang_dcp.dataflow.attention.paged_attention import AttentionShape, PagedPartialAttention
from sglang_dcp.dataflow.attention.partial_attention import torch_partial_attention
from sglang_dcp.dataflow.contracts import AttentionRow, MergeList, PartialState, StepPlan, TokenList
from sglang_dcp.dataflow.device_plan import index_lists, plan_on_device
from sglang_dcp.dataflow.window import chunk_row, pool_rows
from test.unit.dataflow.cluster import Cluster
from test.unit.dataflow.fake_flashinfer import FakeMla, FakePrefill


@pytest.fixture
def kernels(monkeypatch):
    """Both adapters over the stand-ins, without FlashInfer's workspaces; the small model's latent instead of DeepSeek's."""
    import flashinfer

    monkeypatch.setattr(flashinfer, "BatchPrefillWithPagedKVCacheWrapper", FakePrefill)
    monkeypatch.setattr("flashinfer.mla.BatchMLAPagedAttentionWrapper", FakeMla)
    monkeypatch.setattr("sglang_dcp.dataflow.attention.flashinfer_graph.WORKSPACE_BYTES", 16)
    for name, value in (("WORKSPACE_BYTES", 16), ("MLA_LATENT_DIM", 16), ("MLA_ROPE_DIM", 8)):
        monkeypatch.setattr(adapters, name, value)


class HalfCluster(Cluster):
    """A cluster in bfloat16, as the kernels are."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        for pool in self.pools:
            pool.keys, pool.values = pool.keys.bfloat16(), pool.values.bfloat16()

    def randn(self, *shape: int) -> torch.Tensor:
        return super().randn(*shape).bfloat16()


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize(("num_instances", "page_size"), [(2, 4), (4, 16)])
def test_random_steps(kernels, num_instances, page_size, latent):
    """One object per instance over several steps: a plan of one step must not leak into the next."""
    attend = [PagedPartialAttention(page_size, adapters.flashinfer_kernel) for _ in range(num_instances)]
    for seed in range(6):
        cluster = HalfCluster(seed, num_instances, page_size, latent)
        cluster.add_random_rows(int(cluster.rng.integers(1, 6)))
        for rank, output in enumerate(cluster.run(attend)):
            assert not output.isnan().any()
            expected = cluster.expected(rank).float()
            torch.testing.assert_close(output.float(), expected, atol=3e-2, rtol=2e-2)


@pytest.mark.parametrize("seed", range(20))
def test_a_query_sees_every_earlier_token_once(seed):
    """Over all shards, and in the chunk at home: a chunk's pool rows hold what came before it, a single token's the token too."""
    rng = np.random.default_rng(seed)
    page_size, prefix_len, num_new = 4, int(rng.integers(0, 30)), int(rng.integers(1, 25)) if seed % 3 else 1
    owners = rng.integers(0, 3, -(-(prefix_len + num_new) // page_size) + 1)
    seen = []
    for owner in range(3):
        mine = np.flatnonzero(owners == owner)
        for row in pool_rows(num_new, prefix_len, mine, mine, page_size):
            seen += row.kv_slots.tolist()
            assert row.num_queries == num_new and len(row.kv_slots) == row.num_keys and not row.causal
    assert sorted(seen) == list(range(prefix_len + (num_new == 1)))


def test_tables_hold_only_pages_that_are_seen():
    rows = pool_rows(1, 8, np.array([0, 2, 5]), np.array([11, 12, 13]), 4) + pool_rows(3, 6, np.array([0, 1]), np.array([7, 8]), 4)
    table = kernel_table(rows, 4)
    assert table.page_indices.tolist() == [11, 12, 7, 8] and table.page_indptr.tolist() == [0, 2, 4]
    assert table.last_page_length.tolist() == [1, 2] and table.num_keys.tolist() == [5, 6] and table.query_indptr.tolist() == [0, 1, 4]
    chunk = kernel_table([chunk_row(np.arange(2, 5))], 1)
    assert chunk.page_indices.tolist() == [2, 3, 4] and chunk.last_page_length.tolist() == [1] and chunk.num_queries == 3


@pytest.mark.parametrize("latent", [False, True])
def test_results_lie_where_they_are_wanted(kernels, latent):
    attend = PagedPartialAttention(4, adapters.flashinfer_kernel)
    keys = torch.randn(6, 1, 24).bfloat16() if latent else torch.randn(6, 2, 16).bfloat16()
    values = keys[..., :16]
    queries, rows = torch.randn(3, 4, keys.shape[-1]).bfloat16(), (chunk_row(np.arange(2, 5)),)
    expected = torch_partial_attention(queries, keys, values, rows, 0.25)
    place = PartialState.neutral(5, 4, v_head_dim=16, dtype=torch.bfloat16, device="cpu")
    given = PartialState(place.output[1:4], place.lse[1:4])
    attend(queries, keys, values, rows, 0.25, out=given)
    torch.testing.assert_close(place.output[1:4].float(), expected.output, atol=3e-2, rtol=2e-2)
    torch.testing.assert_close(place.lse[1:4], expected.lse, atol=1e-2, rtol=1e-2)
    assert not place.output[0].any() and not place.output[4].any() and torch.isneginf(place.lse[[0, 4]]).all()


def test_rows_and_queries_must_agree(kernels):
    attend = PagedPartialAttention(4, adapters.flashinfer_kernel)
    keys = torch.zeros(8, 2, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="of 1 queries were given 3"):
        attend(torch.zeros(3, 4, 16, dtype=torch.bfloat16), keys, keys, (AttentionRow(1, np.array([1]), 4, 2),), 0.25)


def test_one_plan_per_step(kernels):
    """The layers of a step share a plan; the next step gets its own."""
    attend = PagedPartialAttention(4, adapters.flashinfer_kernel)
    keys = torch.randn(16, 2, 16).bfloat16()
    queries = torch.randn(1, 4, 16).bfloat16()
    plans = []
    original = adapters.FlashInferGqaRows.plan
    adapters_plan = lambda self, table, *args, **kwargs: (plans.append(table), original(self, table, *args, **kwargs))  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters.FlashInferGqaRows, "plan", adapters_plan)
        for length in (5, 9):
            rows = tuple(pool_rows(1, length - 1, np.array([0, 1, 2]), np.array([1, 2, 3]), 4))
            for _ in range(3):
                got = attend(queries, keys, keys, rows, 0.25)
                expected = torch_partial_attention(queries, keys, keys, rows, 0.25)
                torch.testing.assert_close(got.lse, expected.lse, atol=1e-3, rtol=1e-3)
    assert [table.num_keys.tolist() for table in plans] == [[5], [9]]


@pytest.mark.parametrize("seed", range(4))
def test_layers_of_a_window_and_of_all_keys_take_turns(kernels, seed):
    """Each kind has its own plan of the step, in whatever order the layers come; the next step gets new ones."""
    attend = [PagedPartialAttention(4, adapters.flashinfer_kernel) for _ in range(2)]
    for step in range(2):
        cluster = HalfCluster(10 * seed + step, 2, 4, False)
        cluster.add_random_rows(5)
        for cluster.window in (None, 6, None, 6):
            for rank, output in enumerate(cluster.run(attend)):
                torch.testing.assert_close(output.float(), cluster.expected(rank).float(), atol=3e-2, rtol=2e-2)


@dataclass
class NotingFactory:
    """Makes real kernels, and keeps what each was made for and what its plans were told."""

    made: list[tuple[AttentionShape, int]] = field(default_factory=list)
    plans: list[dict[str, Any]] = field(default_factory=list)
    num_runs: int = 0

    def __call__(self, shape: AttentionShape, page_size: int, device: torch.device) -> Any:
        kernel: Any = adapters.flashinfer_kernel(shape, page_size, device)
        self.made.append((shape, page_size))
        plan, run = kernel.plan, kernel.run

        def noted_plan(*call: Any, **given: Any) -> None:
            self.plans.append(given)
            plan(*call, **given)

        def noted_run(*call: Any) -> PartialState:
            self.num_runs += 1
            return run(*call)

        kernel.plan, kernel.run = noted_plan, noted_run
        return kernel


class Prepared:
    """An attention per instance of a cluster, prepared for its layers, and what each has made. windows: of these."""

    def __init__(self, cluster: Cluster, windows: tuple[int | None, ...], quantised: torch.dtype | None = None) -> None:
        heads = cluster.heads, cluster.kv_heads, cluster.qk_dim, cluster.v_dim
        shape = AttentionShape(*heads, torch.bfloat16, cluster.scale, cluster.latent, quantised)
        self.cluster, self.windows = cluster, windows
        self.factories = [NotingFactory() for _ in range(cluster.num_instances)]
        self.attend = [PagedPartialAttention(cluster.page_size, factory) for factory in self.factories]
        for one in self.attend:
            for window in windows:
                one.prepare(shape, window, torch.device("cpu"))

    def check_steps(self) -> None:
        """Steps over all layers plan what is there, make nothing more and are right."""
        before, cluster = [(list(factory.made), len(factory.plans)) for factory in self.factories], self.cluster
        cluster.add_random_rows(6)
        for cluster.window in self.windows * 2:
            for rank, output in enumerate(cluster.run(self.attend)):
                torch.testing.assert_close(output.float(), cluster.expected(rank).float(), atol=3e-2, rtol=3e-2)
        for factory, (made, num_plans) in zip(self.factories, before, strict=True):
            assert factory.made == made and len(factory.plans) > num_plans


@pytest.mark.parametrize("latent", [False, True])
def test_steps_make_no_kernel_that_was_not_prepared(kernels, latent):
    prepared = Prepared(HalfCluster(3, 2, 4, latent), (None,))
    for factory in prepared.factories:
        assert [page_size for _, page_size in factory.made] == [4, 1]
        assert factory.plans == [{"causal": False, "window": None}, {"causal": True, "window": None}] and factory.num_runs == 2
    prepared.check_steps()


def test_layers_of_a_window_are_prepared_too(kernels):
    """A chunk's kernel is another one there; over the pool each query has its own list of keys."""
    prepared = Prepared(HalfCluster(3, 2, 4, False), (6, None))
    for factory in prepared.factories:
        assert [page_size for _, page_size in factory.made] == [1, 1, 4, 1] and factory.num_runs == 4
        assert [(plan["causal"], plan["window"]) for plan in factory.plans] == [(False, None), (True, 6), (False, None), (True, None)]
    prepared.check_steps()


def test_other_layers_and_types_are_refused(kernels):
    shape = AttentionShape(4, 2, 16, 16, torch.float32, 0.25, latent=False)
    with pytest.raises(ValueError, match="bfloat16.*float32"):
        adapters.flashinfer_kernel(shape, 4, torch.device("cpu"))
    other = dataclasses.replace(shape, dtype=torch.bfloat16, latent=True, num_kv_heads=1, v_head_dim=12)
    with pytest.raises(ValueError, match=r"16 \+ 8.*12 \+ 4"):
        adapters.flashinfer_kernel(other, 4, torch.device("cpu"))
    attend = PagedPartialAttention(4, adapters.flashinfer_kernel)
    keys = torch.zeros(8, 2, 16, dtype=torch.bfloat16)
    attend(torch.zeros(1, 4, 16, dtype=torch.bfloat16), keys, keys, (AttentionRow(1, np.array([1]), 4, 2),), 0.25)
    with pytest.raises(ValueError, match="layers differ"):
        attend(torch.zeros(1, 4, 16, dtype=torch.bfloat16), keys, keys, (AttentionRow(1, np.array([1]), 4, 2),), 0.5)


def test_plan_on_device_moves_every_index_list(monkeypatch):
    """Each list comes back where it was; "moved" lists are marked by being one higher."""
    cluster = Cluster(5, 2, 4, False)
    cluster.add_random_rows(4)
    plan = cluster.plan(0)[0]
    assert plan_on_device(plan, torch.device("cpu")) is plan
    monkeypatch.setattr(device_plan, "to_device", lambda host, device: host + 1)
    moved = plan_on_device(plan, torch.device("meta"))
    assert all(new.equal(old + 1) for new, old in zip(index_lists(moved), index_lists(plan), strict=True))
    everywhere = sum(count_indices(getattr(plan, field.name)) for field in dataclasses.fields(StepPlan))
    assert sum(part.numel() for part in index_lists(plan)) == everywhere


def count_indices(value) -> int:
    if isinstance(value, MergeList):
        return sum(part.numel() for part in value.index_lists)
    if isinstance(value, tuple):
        return sum(map(count_indices, value))
    return value.numel() if isinstance(value, torch.Tensor) else len(value) if isinstance(value, TokenList) else 0
