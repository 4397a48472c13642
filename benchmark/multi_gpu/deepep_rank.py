"""One rank that tries DeepEP's kernels, or DeepGEMM's, by themselves: before servers depend on them, and to say which of the two fails."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmark.multi_gpu.collective_rank import join_group

MOST_ROWS = 128
"""SGLang's default SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK."""
ALIGNMENT = 128
"""Rows of an expert are padded to this in a contiguous grouped product."""
OFF_BY = 0.06
_kept: list[Any] = []
"""Buffers stay until the process ends: taking one down is a collective of its own, and not what is tried."""

GEMMS = ("masked gate_up", "masked down", "contiguous gate_up", "contiguous down")


def try_kernels(rank: int, num_ranks: int, folder: Path, mode: str, hidden: int, experts: int) -> dict[str, Any]:
    """mode "low_latency" or "normal": every row goes to all experts, which do nothing, and must come back as it left."""
    join_group(rank, num_ranks, folder)
    torch.cuda.set_device(rank)
    generator = torch.Generator(device="cuda").manual_seed(7 + rank)
    rows = 16 + rank
    hidden_rows = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16, generator=generator)
    experts_of = torch.arange(experts, device="cuda", dtype=torch.int64).repeat(rows, 1)
    weights = torch.softmax(torch.randn(rows, experts, device="cuda", generator=generator), dim=1)
    tried = _try_low_latency if mode == "low_latency" else _try_normal
    found = tried(num_ranks, hidden_rows, experts_of, weights)
    dist.barrier()
    return found


def _try_low_latency(num_ranks: int, rows: torch.Tensor, experts_of: torch.Tensor, weights: torch.Tensor) -> dict[str, Any]:
    from deep_ep import Buffer

    hidden, experts = rows.shape[1], experts_of.shape[1]
    # As SGLang does: DeepEP fixes the depth of its queues when the buffer is made, whether or not a network card is there.
    os.environ["NVSHMEM_QP_DEPTH"] = str(max(1024, 2 * (MOST_ROWS + 1)))
    num_bytes = Buffer.get_low_latency_rdma_size_hint(MOST_ROWS, hidden, num_ranks, experts)
    buffer = Buffer(dist.group.WORLD, 0, num_bytes, low_latency_mode=True, num_qps_per_rank=experts // num_ranks)
    _kept.append(buffer)

    def there_and_back() -> torch.Tensor:
        received, _, handle, _, hook = buffer.low_latency_dispatch(
            rows, experts_of, MOST_ROWS, experts, use_fp8=False, return_recv_hook=True
        )
        hook()
        combined, _, hook = buffer.low_latency_combine(received, experts_of, weights, handle, return_recv_hook=True)
        hook()
        return torch.as_tensor(combined)

    eager = _off_by(there_and_back(), rows)
    graph = torch.cuda.CUDAGraph()
    dist.barrier()
    with torch.cuda.graph(graph):
        combined = there_and_back()
    rows.copy_(torch.randn_like(rows))
    dist.barrier()
    graph.replay()
    captured = _off_by(combined, rows)
    return _judge({"eager": eager, "graph": captured})


def _try_normal(num_ranks: int, rows: torch.Tensor, experts_of: torch.Tensor, weights: torch.Tensor) -> dict[str, Any]:
    from deep_ep import Buffer

    config = Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks)
    num_bytes = max(part.get_nvl_buffer_size_hint(rows.shape[1] * 2, num_ranks) for part in config)
    buffer = Buffer(dist.group.WORLD, num_bytes, 0)
    _kept.append(buffer)

    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(experts_of, experts_of.shape[1])
    received, _, _, _, handle, _ = buffer.dispatch(
        rows,
        topk_idx=experts_of,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        expert_alignment=ALIGNMENT,
    )
    combined, _, _ = buffer.combine(received, handle)
    copies = in_rank.sum(dim=1, keepdim=True)
    return _judge({"eager": _off_by(combined.float() / copies, rows)})


def _off_by(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).abs().max())


def _judge(off_by: dict[str, float]) -> dict[str, Any]:
    """Raises when a row came back as another one; not-a-number is no row at all."""
    for where, worst in off_by.items():
        if math.isnan(worst) or worst > OFF_BY:
            raise RuntimeError(f"{where}: a row is off by {worst:.3g}, more than {OFF_BY}")
    return {"off_by": max(off_by.values())}


def try_gemm(
    rank: int, _num_ranks: int, _folder: Path, cache: Path, hidden: int, width: int, local_experts: int, num_instances: int
) -> dict[str, Any]:
    """GEMMS[rank] of a layer with experts of `width`, against torch. cache: where DeepGEMM keeps what it compiles."""
    os.environ["DG_JIT_CACHE_DIR"] = str(cache)
    torch.cuda.set_device(rank % torch.cuda.device_count())
    began = time.monotonic()
    layout, product = GEMMS[rank].split()
    outputs, inputs = (2 * width, hidden) if product == "gate_up" else (hidden, width)
    generator = torch.Generator(device="cuda").manual_seed(rank)
    matrices = torch.randn(local_experts, outputs, inputs, device="cuda", dtype=torch.bfloat16, generator=generator) / math.sqrt(inputs)
    tried = _try_masked if layout == "masked" else _try_contiguous
    return _judge({GEMMS[rank]: tried(matrices, num_instances, generator)}) | {"seconds": round(time.monotonic() - began, 1)}


def _try_masked(matrices: torch.Tensor, num_instances: int, generator: torch.Generator) -> float:
    """Rows expected per expert decide the kernel: those of decode batches of 1, 2, 4 and 8."""
    import deep_gemm

    experts, outputs, inputs = matrices.shape
    rows = torch.randn(experts, MOST_ROWS * num_instances, inputs, device="cuda", dtype=torch.bfloat16, generator=generator)
    found = torch.zeros(experts, rows.shape[1], outputs, device="cuda", dtype=torch.bfloat16)
    used, worst = 11, 0.0
    counts = torch.full((experts,), used, device="cuda", dtype=torch.int32)
    for batch in (1, 2, 4, 8):
        deep_gemm.m_grouped_bf16_gemm_nt_masked(rows, matrices, found.zero_(), counts, batch * num_instances + 1)
        expected = torch.einsum("erk,enk->ern", rows[:, :used].float(), matrices.float())
        worst = max(worst, _off_by(found[:, :used], expected))
    return worst


def _try_contiguous(matrices: torch.Tensor, num_instances: int, generator: torch.Generator) -> float:
    """One to eight padded blocks of rows per expert."""
    import deep_gemm

    experts, outputs, inputs = matrices.shape
    worst = 0.0
    for blocks in (1, 2, 4, 8):
        experts_of = torch.arange(experts, device="cuda", dtype=torch.int32).repeat_interleave(ALIGNMENT * blocks)
        rows = torch.randn(len(experts_of), inputs, device="cuda", dtype=torch.bfloat16, generator=generator)
        found = torch.zeros(len(experts_of), outputs, device="cuda", dtype=torch.bfloat16)
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(rows, matrices, found, experts_of)
        expected = torch.einsum("erk,enk->ern", rows.view(experts, -1, inputs).float(), matrices.float())
        worst = max(worst, _off_by(found.view(experts, -1, outputs), expected))
    return worst
