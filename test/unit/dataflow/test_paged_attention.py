"""The GPU's attention path on the CPU (spans, page lists, plans, the calls into FlashInfer) against attention over the whole sequence."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from sglang_dcp.dataflow import paged_attention_flashinfer as adapters
from sglang_dcp.dataflow.attention_spans import row_spans, span_tables
from sglang_dcp.dataflow.device_plan import INDEX_FIELDS, plan_on_device
from sglang_dcp.dataflow.paged_attention import AttentionShape, PagedPartialAttention
from sglang_dcp.dataflow.partial_attention import torch_partial_attention
from sglang_dcp.dataflow.step_plan import attention_row
from test.unit.dataflow.cluster import Cluster
from test.unit.dataflow.fake_flashinfer import FakeMla, FakePrefill


@pytest.fixture
def kernels(monkeypatch):
    """Both adapters over the stand-ins, without FlashInfer's workspaces; the small model's latent instead of DeepSeek's."""
    import flashinfer

    monkeypatch.setattr(flashinfer, "BatchPrefillWithPagedKVCacheWrapper", FakePrefill)
    monkeypatch.setattr("flashinfer.mla.BatchMLAPagedAttentionWrapper", FakeMla)
    monkeypatch.setattr("sglang_dcp.dataflow.partial_attention_flashinfer.WORKSPACE_BYTES", 16)
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
        plans = {id(pool): rank for rank, pool in enumerate(cluster.pools)}

        def attention(queries, keys, values, rows, scale, plans=plans, cluster=cluster):
            rank = next(plans[id(pool)] for pool in cluster.pools if pool.keys is keys)
            return attend[rank](queries, keys, values, rows, scale)

        for rank, output in enumerate(cluster.run(attention)):
            assert not output.isnan().any()
            expected = cluster.expected(rank).float()
            torch.testing.assert_close(output.float(), expected, atol=3e-2, rtol=2e-2)


@pytest.mark.parametrize("seed", range(20))
def test_spans_cover_what_rows_see(seed):
    """Every query that sees a key is in exactly one span, and sees there as many keys as the row's mask says."""
    rng = np.random.default_rng(seed)
    page_size, prefix_len, num_new = 4, int(rng.integers(0, 30)), int(rng.integers(1, 25))
    mine = np.flatnonzero(rng.random(-(-(prefix_len + num_new) // page_size) + 1) < 0.5)
    row = attention_row(7, num_new, prefix_len, mine, rng.permutation(100)[: len(mine)] + 1, page_size)
    positions = (mine[:, None] * page_size + np.arange(page_size)).ravel()
    positions = positions[positions < prefix_len + num_new]
    assert row.num_keys == len(positions) == len(row.kv_slots)
    seen = {7 + i: int((positions <= prefix_len + i).sum()) for i in range(num_new)}
    told: dict[int, int] = {}
    for span in row_spans(row):
        for i in range(span.num_queries):
            assert span.query_start + i not in told
            told[span.query_start + i] = span.num_keys - (span.num_queries - 1 - i if span.causal else 0)
    assert told == {query: count for query, count in seen.items() if count}


def test_tables_hold_only_pages_that_are_seen():
    row = attention_row(0, 1, 9, np.array([0, 2, 5]), np.array([11, 12, 13]), 4)
    unmasked, causal = span_tables([row], 4)
    assert unmasked.page_indices.tolist() == [11, 12] and unmasked.last_page_length.tolist() == [2] and unmasked.num_keys.tolist() == [6]
    assert len(causal) == 0 and causal.query_indptr.tolist() == [0]


def test_a_step_without_rows_here_is_neutral(kernels):
    attend = PagedPartialAttention(4, adapters.flashinfer_kernel)
    keys = torch.zeros(8, 2, 16, dtype=torch.bfloat16)
    state = attend(torch.zeros(3, 4, 16, dtype=torch.bfloat16), keys, keys, (), 0.25)
    assert torch.isneginf(state.lse).all() and not state.output.any()


def test_one_plan_per_step(kernels):
    """The layers of a step share a plan; the next step gets its own."""
    attend = PagedPartialAttention(4, adapters.flashinfer_kernel)
    keys = torch.randn(16, 2, 16).bfloat16()
    queries = torch.randn(1, 4, 16).bfloat16()
    plans = []
    original = adapters.FlashInferGqaSpans.plan
    adapters_plan = lambda self, table, *args, **kwargs: (plans.append(table), original(self, table, *args, **kwargs))  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters.FlashInferGqaSpans, "plan", adapters_plan)
        for length in (5, 9):
            rows = (attention_row(0, 1, length - 1, np.array([0, 1, 2]), np.array([1, 2, 3]), 4),)
            for _ in range(3):
                got = attend(queries, keys, keys, rows, 0.25)
                expected = torch_partial_attention(queries, keys, keys, rows, 0.25)
                torch.testing.assert_close(got.lse, expected.lse, atol=1e-3, rtol=1e-3)
    assert [table.num_keys.tolist() for table in plans] == [[5], [9]]


def test_other_layers_and_types_are_refused(kernels):
    shape = AttentionShape(4, 2, 16, 16, torch.float32, 0.25, latent=False)
    with pytest.raises(ValueError, match="bfloat16.*float32"):
        adapters.flashinfer_kernel(shape, 4, torch.device("cpu"))
    other = dataclasses.replace(shape, dtype=torch.bfloat16, latent=True, num_kv_heads=1, v_head_dim=12)
    with pytest.raises(ValueError, match=r"16 \+ 8.*12 \+ 4"):
        adapters.flashinfer_kernel(other, 4, torch.device("cpu"))
    attend = PagedPartialAttention(4, adapters.flashinfer_kernel)
    keys = torch.zeros(8, 2, 16, dtype=torch.bfloat16)
    attend(torch.zeros(1, 4, 16, dtype=torch.bfloat16), keys, keys, (), 0.25)
    with pytest.raises(ValueError, match="layers differ"):
        attend(torch.zeros(1, 4, 16, dtype=torch.bfloat16), keys, keys, (), 0.5)


def test_plan_on_device_moves_every_index_list():
    cluster = Cluster(5, 2, 4, False)
    cluster.add_random_rows(4)
    plan = cluster.plan(0)[0]
    assert plan_on_device(plan, torch.device("cpu")) is plan
    lists = {f.name for f in dataclasses.fields(plan) if isinstance(getattr(plan, f.name), torch.Tensor)}
    assert lists == set(INDEX_FIELDS)
    assert plan.num_partials == 1 + int(plan.merge_depth.max())
