"""Steps over pools of 8-bit floats: K/V is quantised at home, travels as words, and a chunk attends its own tokens as they are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sglang_dcp.dataflow.attention import flashinfer_step as adapters
from sglang_dcp.dataflow.attention.paged_attention import AttentionShape, PagedPartialAttention
from sglang_dcp.dataflow.attention.partial_attention import torch_partial_attention
from sglang_dcp.dataflow.contracts import KVScales, NewKV
from sglang_dcp.dataflow.dispatch import dispatch
from sglang_dcp.dataflow.quantised_kv import quantised, with_quantised
from sglang_dcp.dataflow.reference import partial_attention
from sglang_dcp.dataflow.window import pool_rows
from test.unit.dataflow.cluster import Cluster
from test.unit.dataflow.test_paged_attention import Prepared, kernels  # noqa: F401

FP8 = torch.float8_e4m3fn
SCALES = KVScales(0.5, 2.0)


class QuantisedCluster(Cluster):
    """Queries of `dtype`, pools of float8_e4m3fn. A prefix is what a pool gives back; a chunk's own tokens are not quantised."""

    def __init__(self, *args, dtype: torch.dtype = torch.float32, scales: KVScales = SCALES) -> None:
        self.dtype = dtype
        super().__init__(*args)
        self.kv_scales = scales
        for pool in self.pools:
            pool.keys, pool.values = pool.keys.to(FP8), pool.values.to(FP8)

    def randn(self, *shape: int) -> torch.Tensor:
        return super().randn(*shape).to(self.dtype)

    def new_kv(self, request, span: slice) -> NewKV:
        return with_quantised(super().new_kv(request, span), self.kv_scales, FP8).stored

    def plan(self, rank: int):
        plan, queries, kv = super().plan(rank)
        return plan, queries, with_quantised(kv, self.kv_scales, FP8)

    def expected(self, rank: int) -> torch.Tensor:
        parts = []
        for request in (request for request in self.requests if request.home == rank):
            keys, values = (rows.float().clone() for rows in (request.keys, request.values))
            stored = len(keys) if request.num_new == 1 else request.prefix_len
            keys[:stored] = quantised(request.keys[:stored], self.kv_scales.key, FP8).float() * self.kv_scales.key
            values[:stored] = quantised(request.values[:stored], self.kv_scales.value, FP8).float() * self.kv_scales.value
            positions = torch.arange(len(keys))
            where = {"query_positions": positions[request.prefix_len :], "key_positions": positions}
            parts.append(partial_attention(request.query.float(), keys, values, scale=self.scale, **where).output)
        return torch.cat(parts) if parts else torch.zeros(1, self.heads, self.v_dim)


@pytest.mark.parametrize(("num_instances", "page_size", "scales"), itertools.product([2, 4], [4, 16], [KVScales(), SCALES]))
def test_random_steps_equal_one_quantised_pool(num_instances, page_size, scales) -> None:
    for seed in range(10):
        cluster = QuantisedCluster(seed, num_instances, page_size, False, scales=scales)
        cluster.add_random_rows(int(cluster.rng.integers(1, 6)))
        for rank, output in enumerate(cluster.run()):
            torch.testing.assert_close(output, cluster.expected(rank), atol=1e-5, rtol=1e-5)


def test_random_latent_steps_equal_one_quantised_pool() -> None:
    for seed in range(10):
        cluster = QuantisedCluster(seed, 3, 4, True, scales=KVScales())
        cluster.add_random_rows(int(cluster.rng.integers(1, 6)))
        for rank, output in enumerate(cluster.run()):
            torch.testing.assert_close(output[:, :, :16], cluster.expected(rank), atol=1e-5, rtol=1e-5)


def test_the_kernels_take_one_type_for_the_pool_and_one_for_the_chunk(kernels) -> None:  # noqa: F811
    attend = [PagedPartialAttention(4, adapters.flashinfer_kernel) for _ in range(2)]
    for seed in range(6):
        cluster = QuantisedCluster(seed, 2, 4, False, dtype=torch.bfloat16)
        cluster.add_random_rows(int(cluster.rng.integers(1, 6)))
        for rank, output in enumerate(cluster.run(attend)):
            torch.testing.assert_close(output.float(), cluster.expected(rank), atol=3e-2, rtol=3e-2)


def test_kernels_of_both_types_are_prepared(kernels) -> None:  # noqa: F811
    prepared = Prepared(QuantisedCluster(3, 2, 4, False, dtype=torch.bfloat16), (None,), FP8)
    for factory in prepared.factories:
        assert [shape.quantised for shape, _ in factory.made] == [FP8, None] and factory.num_runs == 2
    prepared.check_steps()


def test_half_the_bytes_travel() -> None:
    cluster = QuantisedCluster(1, 2, 4, False)
    cluster.add(home=0, prefix_len=0, num_new=8, owners=[1, 0])
    plan, queries, kv = cluster.plan(0)
    sent = []

    class Recorder:
        def all_to_all(self, message, send_splits, receive_splits, **where):
            sent.append(list(send_splits))
            return message[:0]

    dispatch(queries, kv, plan, Recorder(), layer=0)
    words_of_a_token = 2 * cluster.kv_heads * cluster.qk_dim * FP8.itemsize // torch.float32.itemsize
    assert sent == [[0, 4 * words_of_a_token]]


def test_quantising_leaves_what_the_chunk_attends() -> None:
    """SGLang's own pools divide the keys that they are handed."""
    keys = torch.randn(3, 2, 16)
    before = keys.clone()
    kv = with_quantised(NewKV(keys, keys, latent=False), SCALES, FP8)
    assert kv.keys.equal(before) and kv.stored.keys.dtype == FP8 and kv.stored is not kv
    assert not kv.stored.keys.float().equal(kv.stored.values.float()), "two scales"
    assert with_quantised(kv, SCALES, torch.float32) is kv


def test_a_chunk_can_attend_what_is_stored() -> None:
    kv = NewKV(torch.randn(3, 2, 16), torch.randn(3, 2, 16), latent=False)
    read_back = with_quantised(kv, SCALES, FP8, attend_stored=True)
    assert read_back.keys.equal(read_back.stored.keys.float() * 0.5) and not read_back.keys.equal(kv.keys)
    assert read_back.values.equal(read_back.stored.values.float() * 2.0) and read_back.keys.dtype == kv.keys.dtype
    torch.testing.assert_close(read_back.keys, kv.keys, atol=0.2, rtol=0.1)


def test_scales_count_in_plain_torch() -> None:
    keys, values = torch.randn(8, 2, 16), torch.randn(8, 2, 16)
    queries, rows = torch.randn(1, 4, 16), tuple(pool_rows(1, 5, np.array([0, 1]), np.array([0, 1]), 4))
    exact = torch_partial_attention(queries, keys, values, rows, 0.25)
    scaled = torch_partial_attention(queries, keys / 0.5, values / 2.0, rows, 0.25, kv_scales=SCALES)
    torch.testing.assert_close(scaled.output, exact.output)
    torch.testing.assert_close(scaled.lse, exact.lse)


@pytest.mark.parametrize("latent", [True, False])
def test_other_quantised_pools_are_refused(latent: bool) -> None:
    heads = (16, 1, 576, 512) if latent else (4, 2, 16, 16)
    shape = AttentionShape(*heads, torch.bfloat16, 0.25, latent=latent, quantised=torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"sharded attention on a GPU serves no pool of torch.float8"):
        adapters.flashinfer_kernel(shape, 4, torch.device("cpu"))


def test_a_graph_exchanges_half_the_elements_of_a_row() -> None:
    pytest.importorskip("sgl_kernel_dcp")
    from sglang_dcp.dataflow.graph.graph_attention import GraphSizes

    sizes = GraphSizes(2, 8, (4, 16), 16, 64, 100)
    shapes = [AttentionShape(8, 2, 128, 128, torch.bfloat16, 0.1, False, quantised=quantised) for quantised in (None, FP8)]
    exchanges = [sizes.exchange(shape) for shape in shapes]
    assert [one.kv_row_elements for one in exchanges] == [512, 256] and [one.qk_head_dim for one in exchanges] == [128, 128]
    assert [sizes.exchange(shape, "fa3").qk_head_dim for shape in shapes] == [128, 64], "fa3 takes queries of the pool's type"
    latent = [AttentionShape(16, 1, 576, 512, torch.bfloat16, 0.1, True, quantised=quantised) for quantised in (None, FP8)]
    exchanges = [sizes.exchange(shape, "flashmla") for shape in latent]
    assert [one.kv_row_elements for one in exchanges] == [576, 288] == [one.qk_head_dim for one in exchanges]
