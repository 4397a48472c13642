"""The per-layer path with FlashInfer's kernels on a GPU: instances as threads of one process, against attention over the whole sequence."""

from __future__ import annotations

import pytest
import torch

from sglang_dcp.dataflow.device_plan import plan_on_device
from sglang_dcp.dataflow.paged_attention import PagedPartialAttention
from sglang_dcp.dataflow.paged_attention_flashinfer import flashinfer_kernel
from test.unit.dataflow.cluster import Cluster, PoolCache

pytestmark = pytest.mark.gpu
pytest.importorskip("flashinfer")
if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("no Hopper GPU on this machine", allow_module_level=True)


class GpuCluster(Cluster):
    """bfloat16 on the GPU, in the kernels' sizes."""

    def __init__(self, seed: int, num_instances: int, page_size: int, latent: bool) -> None:
        super().__init__(seed, num_instances, page_size, latent)
        self.heads, self.kv_heads, self.qk_dim, self.v_dim = (16, 1, 576, 512) if latent else (8, 2, 128, 128)
        self.scale = self.qk_dim**-0.5
        with torch.device("cuda"):
            self.pools = [PoolCache(65 * page_size, self.kv_heads, self.qk_dim, self.v_dim, latent) for _ in range(num_instances)]
        for pool in self.pools:
            pool.keys, pool.values = pool.keys.bfloat16(), pool.values.bfloat16()

    def randn(self, *shape: int) -> torch.Tensor:
        return super().randn(*shape).cuda().bfloat16()

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
