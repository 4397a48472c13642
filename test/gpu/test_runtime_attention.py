"""The per-layer path with FlashInfer's kernels on a GPU: instances as threads of one process, against attention over the whole sequence."""

from __future__ import annotations

import pytest
import torch

from sglang_dcp.dataflow.attention.flashinfer_step import flashinfer_kernel
from sglang_dcp.dataflow.attention.paged_attention import AttentionShape, PagedPartialAttention
from sglang_dcp.dataflow.contracts import MergeList, PartialState
from sglang_dcp.dataflow.device_plan import plan_on_device
from sglang_dcp.dataflow.dispatch import partial_width, partials_in
from sglang_dcp.dataflow.merge import merge_into
from test.unit.dataflow.cluster import Cluster, PoolCache
from test.unit.dataflow.test_merge import SOURCES, check

pytestmark = pytest.mark.gpu
pytest.importorskip("flashinfer")
if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("no Hopper GPU on this machine", allow_module_level=True)


class GpuCluster(Cluster):
    """On the GPU, in the kernels' sizes."""

    def __init__(self, seed: int, num_instances: int, page_size: int, latent: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(seed, num_instances, page_size, latent)
        self.dtype = dtype
        self.heads, self.kv_heads, self.qk_dim, self.v_dim = (16, 1, 576, 512) if latent else (8, 2, 128, 128)
        self.scale = self.qk_dim**-0.5
        with torch.device("cuda"):
            self.pools = [PoolCache(65 * page_size, self.kv_heads, self.qk_dim, self.v_dim, latent) for _ in range(num_instances)]
        for pool in self.pools:
            pool.keys, pool.values = pool.keys.to(dtype), pool.values.to(dtype)

    def randn(self, *shape: int) -> torch.Tensor:
        return super().randn(*shape).cuda().to(self.dtype)

    def plan(self, rank: int):
        plan, queries, new_kv = super().plan(rank)
        return plan_on_device(plan, queries.device), queries, new_kv

    def expected(self, rank: int) -> torch.Tensor:
        with torch.device("cuda"):
            return super().expected(rank)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize(("num_instances", "page_size"), [(2, 16), (4, 64)])
def test_random_steps(num_instances: int, page_size: int, latent: bool) -> None:
    attend = [PagedPartialAttention(page_size, flashinfer_kernel) for _ in range(num_instances)]
    for seed in range(5):
        cluster = GpuCluster(seed, num_instances, page_size, latent)
        cluster.add_random_rows(int(cluster.rng.integers(1, 6)))
        for rank, output in enumerate(cluster.run(attend)):
            assert not output.isnan().any()
            torch.testing.assert_close(output.float(), cluster.expected(rank).float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("quantised", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize(("heads", "windows"), [((8, 2, 128, 128), (None, 127)), ((16, 1, 576, 512), (None,))])
def test_a_server_can_prepare_its_kernels(heads: tuple[int, ...], windows: tuple[int | None, ...], quantised: torch.dtype | None) -> None:
    """As it does when it starts, outside a step."""
    shape = AttentionShape(*heads, torch.bfloat16, 0.1, heads[1] == 1, quantised)
    attend = PagedPartialAttention(64, flashinfer_kernel)
    for window in windows:
        attend.prepare(shape, window, torch.device("cuda"))
    torch.cuda.synchronize()


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize(("num_instances", "page_size"), [(2, 16), (4, 64)])
def test_random_steps_in_float32(num_instances: int, page_size: int, latent: bool) -> None:
    """The kernels take 16-bit elements; plain torch (--attention-backend torch_native) takes any."""
    for seed in range(3):
        cluster = GpuCluster(seed, num_instances, page_size, latent, torch.float32)
        cluster.add_random_rows(int(cluster.rng.integers(1, 6)))
        for rank, output in enumerate(cluster.run()):
            torch.testing.assert_close(output, cluster.expected(rank), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "dim"), [(64, 128), (128, 512), (16, 512), (5, 96)])
@pytest.mark.parametrize("sources", SOURCES.values(), ids=SOURCES)
def test_merge_kernel_rounds_once(sources: tuple, heads: int, dim: int, dtype: torch.dtype) -> None:
    """Partials of up to 15 shards, neutral ones with rubbish in them, against float64; other rows keep their bits."""

    def merge(state: PartialState, merges: MergeList, own: PartialState, returned: PartialState) -> None:
        there = [PartialState(part.output.cuda(), part.lse.cuda()) for part in (state, own)]
        back = torch.zeros(len(returned.lse), partial_width(heads, dim, dtype), dtype=dtype, device="cuda")
        arrived = partials_in(back, heads, dim)
        arrived.output.copy_(returned.output)
        arrived.lse.copy_(returned.lse)
        merge_into(there[0], MergeList(*(part.cuda() for part in merges.index_lists)), there[1], arrived)
        state.output.copy_(there[0].output)
        state.lse.copy_(there[0].lse)

    check(merge, sources, heads, dim, dtype, rounding=1.01 * 2**-8)
