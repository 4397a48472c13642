"""Tries each thing that SGLang lacks on a CPU, without any hook of ours, and prints the outcomes as JSON.

Runs in a process of its own (see test_cpu_gaps.py): the environment must be set before SGLang is imported. An outcome is "works",
or the name of the exception that shows the gap.
"""

import inspect
import json
import tempfile
import types
from pathlib import Path

import torch
import torch.distributed as dist


def outcome(attempt):
    try:
        attempt()
    except Exception as error:  # noqa: BLE001 - whatever it raises is the finding
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "works"


def group_of_one():
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    return GroupCoordinator(
        group_ranks=[[0]],
        local_rank=0,
        torch_distributed_backend="gloo",
        use_pynccl=False,
        use_mscclpp=False,
        use_custom_allreduce=False,
        use_torch_symm_mem_all_reduce=False,
        use_hpu_communicator=False,
        use_xpu_communicator=False,
        group_name="probe",
    )


def default_use_pynccl():
    """What init_model_parallel_group passes on for a gloo group."""
    from sglang.srt.distributed import parallel_state

    seen = {}
    original = parallel_state.GroupCoordinator
    parallel_state.GroupCoordinator = lambda **arguments: seen.update(arguments)
    try:
        parallel_state.init_model_parallel_group(group_ranks=[[0]], local_rank=0, backend="gloo")
    finally:
        parallel_state.GroupCoordinator = original
    return seen["use_pynccl"]


def native_experts_with_foreign_ids():
    from sglang.srt.layers.moe.fused_moe_native import moe_forward_native

    layer = types.SimpleNamespace(num_experts=4, w13_weight=torch.ones(2, 8, 4), w2_weight=torch.ones(2, 4, 4))
    config = types.SimpleNamespace(
        apply_router_weight_on_input=False, activation="silu", gemm1_alpha=None, gemm1_clamp_limit=None, swiglu_limit=None
    )
    ids = torch.tensor([[0, -1], [-1, 1]])
    moe_forward_native(layer, torch.ones(2, 4), (torch.ones(2, 2), ids, None), config)


def kv_heads_of_two_on_four_ranks():
    """KV heads that a model with 2 gets on 4 ranks, though attention data parallelism gives every rank all heads."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp

    source = Path(__file__).resolve().parents[2] / "testing" / "models" / "qwen3moe" / "config.json"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(json.loads(source.read_text()) | {"num_key_value_heads": 2}))
        return adjust_config_with_unaligned_cpu_tp(ModelConfig(folder), LoadConfig(), 4).num_key_value_heads


def rope_without_yarn():
    from sglang.srt.layers.rotary_embedding.factory import get_rope_cpu

    get_rope_cpu(16, 16, 4096, 10000.0, False, None, torch.float32, 1.0, "cpu")


def router_polls_without_waiting():
    """Whether the router's loop asks its socket without blocking, over and over."""
    from sglang.srt.managers.data_parallel_controller import DataParallelController

    source = inspect.getsource(DataParallelController.event_loop)
    return "while True" in source and "NOBLOCK" in source and ".poll(" not in source


def probe():
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.utils import cpu_has_amx_support, is_cpu

    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    group = group_of_one()
    rows = torch.ones(3, 2)
    return {
        "is_cpu": is_cpu(),
        "amx": cpu_has_amx_support(),
        "torch_native_fill_value": hasattr(TorchNativeAttnBackend, "get_cpu_graph_seq_len_fill_value"),
        "torch_native_mla_handler": "torch_native" in AttentionBackendRegistry._handlers,
        "default_use_pynccl": default_use_pynccl(),
        "reduce_scatterv": outcome(lambda: group.reduce_scatterv(rows, sizes=[3])),
        "all_gatherv": outcome(lambda: group.all_gatherv(rows, sizes=[3])),
        "native_experts": outcome(native_experts_with_foreign_ids),
        "kv_heads_of_two_on_four_ranks": kv_heads_of_two_on_four_ranks(),
        "router_polls_without_waiting": router_polls_without_waiting(),
        "rope_without_yarn": outcome(rope_without_yarn),
    }


if __name__ == "__main__":
    print("PROBE " + json.dumps(probe()))
