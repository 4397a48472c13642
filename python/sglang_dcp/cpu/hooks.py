"""What SGLang 0.5.23 lacks on a CPU, as data. The set `cpu` is installed on a CPU device only; stock serving there has it alone.

Not here, because it cannot be a hook: the sgl_kernel stand-in and the two environment variables (environment.py), needed before
Python imports SGLang; and kv heads that must be divisible by the number of instances (README of testing/models).
"""

from __future__ import annotations

from sglang_dcp.upstream.attach.hook import Hook

_GROUP = "sglang.srt.distributed.parallel_state.GroupCoordinator"
_HANDLERS = "sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry"

CPU_HOOKS: tuple[Hook, ...] = (
    Hook(
        target=f"{_GROUP}.__init__",
        kind="before",
        hook_set="cpu",
        handler="sglang_dcp.cpu.collectives:without_pynccl",
        why="no NCCL communicator on a CPU",
        upstream="init_model_parallel_group exempts NPU and XPU from pynccl, not the CPU",
        remove_when="a group of gloo ranks comes up without libnccl",
        parameters=("use_pynccl",),
    ),
    Hook(
        target=f"{_GROUP}.reduce_scatterv",
        kind="replace",
        hook_set="cpu",
        handler="sglang_dcp.cpu.collectives:reduce_scatterv",
        why="sum of the MoE output of unequal batches",
        upstream="requires pynccl",
        remove_when="reduce_scatterv works on a gloo group",
        parameters=("input_", "output", "sizes"),
    ),
    Hook(
        target=f"{_GROUP}.all_gatherv",
        kind="replace",
        hook_set="cpu",
        handler="sglang_dcp.cpu.collectives:all_gatherv",
        why="MoE input of unequal batches",
        upstream="requires pynccl",
        remove_when="all_gatherv works on a gloo group",
        parameters=("input_", "sizes", "output"),
    ),
    Hook(
        target="sglang.srt.layers.moe.fused_moe_native.moe_forward_native",
        kind="replace",
        hook_set="cpu",
        handler="sglang_dcp.cpu.experts:forward_local_experts",
        why="expert parallelism marks experts of other ranks with -1",
        upstream="the native loop scatters with the ids",
        remove_when="moe_forward_native takes -1",
        parameters=("layer", "x", "topk_output", "moe_runner_config"),
    ),
    Hook(
        target="sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value",
        kind="add",
        hook_set="cpu",
        handler="sglang_dcp.cpu.attention:cpu_graph_seq_len_fill_value",
        why="ForwardBatch asks for it whenever it pads a batch on a CPU",
        upstream="only the AMX and hybrid backends define it",
        remove_when="the torch_native backend or its base class defines it",
    ),
    Hook(
        target=f"{_HANDLERS}.register",
        kind="register",
        hook_set="cpu",
        handler="sglang_dcp.cpu.attention:register_absorbed_mla",
        why="MLA prefill on torch_native must be absorbed, as its pool is",
        upstream="torch_native has no handler and gets triton's",
        remove_when="the registry has a torch_native handler of its own",
        parameters=("backend_name", "handler_func"),
    ),
    Hook(
        target="sglang.srt.managers.data_parallel_controller.DataParallelController.event_loop",
        kind="replace",
        hook_set="cpu",
        handler="sglang_dcp.cpu.controller:event_loop",
        why="the router's busy polling takes a core that the instances need",
        upstream="event_loop receives with NOBLOCK in a loop",
        remove_when="the controller waits on its socket",
    ),
)
