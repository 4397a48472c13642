"""Experts that a checkpoint holds as one tensor: each rank of expert parallelism loads its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

from sglang_dcp.cpu.environment import count_cuda_devices, cpu_additions
from sglang_dcp.upstream.layers.fused_experts import load_own_experts

EXPERTS, WIDTH = 8, 3


def layer_of(rank: int, ranks: int, **changes: Any) -> Any:
    fields = {"num_experts": EXPERTS, "num_local_experts": EXPERTS // ranks, "moe_ep_rank": rank, "moe_ep_size": ranks}
    return types.SimpleNamespace(**fields | {"num_fused_shared_experts": 0, "uses_expert_location": False, "layer_id": 0} | changes)


def copy_all(_layer: Any, param: torch.Tensor, loaded_weight: torch.Tensor, _name: str, shard_id: str) -> None:
    """As SGLang's loader does it."""
    param.copy_(loaded_weight)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_hold_the_checkpoint_in_its_order(ranks: int) -> None:
    checkpoint = torch.arange(EXPERTS * WIDTH).reshape(EXPERTS, WIDTH)
    parts = []
    for rank in range(ranks):
        parts.append(torch.empty(EXPERTS // ranks, WIDTH, dtype=checkpoint.dtype))
        load_own_experts(copy_all, layer_of(rank, ranks), parts[-1], checkpoint, "w13_weight", shard_id="w13")
    assert torch.equal(torch.cat(parts), checkpoint)


def test_a_part_that_was_cut_before_is_left_alone() -> None:
    part, param = torch.ones(4, WIDTH), torch.zeros(4, WIDTH)
    load_own_experts(copy_all, layer_of(1, 2), param, part, "w2_weight", shard_id="w2")
    assert torch.equal(param, part)


@pytest.mark.parametrize(
    "changes", [{"num_experts": EXPERTS + 2, "num_local_experts": 5}, {"num_experts": EXPERTS + 1, "num_fused_shared_experts": 1}]
)
def test_where_experts_are_counted_otherwise_the_error_stands(changes: dict[str, int]) -> None:
    """Redundant experts, and a shared one among them."""
    layer = layer_of(0, 2, **changes)
    with pytest.raises(RuntimeError, match="must match the size"):
        load_own_experts(copy_all, layer, torch.zeros(layer.num_local_experts, WIDTH), torch.ones(EXPERTS, WIDTH), "w", shard_id="w13")


REAL = """
import json, torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang_dcp.upstream.attach.install import install
from sglang_dcp.upstream.attach.layer_hooks import LAYER_HOOKS

def loaded(rank):
    layer = FusedMoE.__new__(FusedMoE)
    torch.nn.Module.__init__(layer)
    vars(layer).update(num_experts=4, num_local_experts=2, moe_ep_rank=rank, moe_ep_size=2, moe_tp_rank=0, moe_tp_size=1,
        num_fused_shared_experts=0, uses_expert_location=True, layer_id=0, quant_config=None, scheme=None, quant_method=None,
        use_triton_kernels=False, use_presharded_weights=False, use_padded_loading=False, use_flashinfer_trtllm_moe=False)
    layer.quant_method = None
    layer.moe_runner_config = None
    param = torch.nn.Parameter(torch.empty(2, 6, 5), requires_grad=False)
    try:
        layer.weight_loader_fused(param, torch.arange(120.0).reshape(4, 6, 5), "w13_weight", shard_id="w13")
    except RuntimeError as error:
        return str(error)
    return param.data[:, 0, 0].tolist()

before = loaded(1)
install([hook for hook in LAYER_HOOKS if hook.target.endswith("weight_loader_fused")])
print("PROBE " + json.dumps([before, loaded(0), loaded(1)]))
"""


@pytest.mark.own_process
def test_sglangs_own_loader_behind_the_hook() -> None:
    """The first outcome is SGLang's alone: when it is no error, the hook can go."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
    environment = clean | cpu_additions(1, clean, has_cuda_driver=count_cuda_devices() is not None)
    command = [sys.executable, "-c", REAL]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("PROBE ")]
    assert lines, result.stderr[-2000:]
    before, first, second = json.loads(lines[0].removeprefix("PROBE "))
    assert "must match the size" in before
    assert (first, second) == ([0.0, 30.0], [60.0, 90.0])
