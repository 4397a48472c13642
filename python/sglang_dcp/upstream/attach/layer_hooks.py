"""Touch points on layers: attention backends, decode graphs, and what ran as which; experts as they are loaded."""

from __future__ import annotations

from sglang_dcp.upstream.attach.hook import Hook

LAYER_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.layers.attention.attention_registry.register_attention_backend",
        kind="register",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.layers.backends:register_backends",
        why="steps with sharded rows run our per-layer path",
        upstream="nothing: this is the official registry",
        remove_when="never",
        parameters=(),
    ),
    Hook(
        target="sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.register",
        kind="register",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.layers.mla_form:register_mla_form",
        why="on a GPU, MLA is absorbed in every step with sharded rows, prefill included",
        upstream="nothing: this is the official registry",
        remove_when="never",
        parameters=("backend_name", "handler_func"),
    ),
    Hook(
        target="sglang.srt.models.utils.enable_fused_set_kv_buffer",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.layers.attention_backend:fused_kv_write",
        why="on a GPU, the rope kernel must not write K/V of sharded rows by itself",
        upstream="the attention backend decides who writes K/V",
        remove_when="the backend is asked before a fused write",
        parameters=("forward_batch",),
    ),
    Hook(
        target="sglang.srt.layers.attention.graph_variants.create_attention_graph_variants",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.layers.graph_variants:add_graph_variants",
        why="decode graphs are captured per number of guest rows too",
        upstream="attention backends name their graph variants",
        remove_when="a backend can return graph variants",
        parameters=("hf_config",),
    ),
    Hook(
        target="sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.weight_loader_fused",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.layers.fused_experts:load_own_experts",
        why="of a tensor with all experts (gpt-oss in bfloat16) a rank loads its own",
        upstream="weight_loader maps an expert to its rank, weight_loader_fused does not",
        remove_when="SGLang loads bfloat16 gpt-oss with --ep above 1",
        parameters=("param", "loaded_weight"),
    ),
    Hook(
        target="sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.step.handlers:after_forward",
        why="the share of steps that ran as graphs is a metric; behind the layers: was a peer silent, was a layer missed",
        upstream="a counter of graph replays",
        remove_when="SGLang counts them",
        parameters=(),
    ),
)
