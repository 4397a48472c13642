"""What SGLang lacks on a CPU for loading models: heads of attention ranks, plain rope, allocation without sgl_kernel."""

from __future__ import annotations

from ..codemod import Contribution, EditedTree

HEADS = "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp"
RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
ROPE = "sglang.srt.layers.rotary_embedding.factory.get_rope_cpu"
ALLOCATION = "sglang.srt.mem_cache.allocation"
MOVES = "sglang.kernels.ops.kvcache.cache_move"
ASSIGN = f"{ALLOCATION}.assign_req_to_token_pool_func"

TORCH_ASSIGN = '''
def _assign_req_to_token_pool_torch(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc):
    """The CPU kernel's job in torch, where sgl_kernel cannot be loaded."""
    first = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist()
    ):
        count = end - start
        req_to_token[row, start:end] = out_cache_loc[first : first + count].to(
            req_to_token.dtype
        )
        first += count
'''


def heads(tree: EditedTree) -> None:
    tree.replace(HEADS, "tp_size: int\n) -> ModelConfig:", "tp_size: int, attn_tp_size: int | None = None\n) -> ModelConfig:")
    tree.insert_first(
        HEADS,
        """
        # With attention data parallelism a rank holds all heads of its replica.
        attn_tp_size = tp_size if attn_tp_size is None else attn_tp_size
        """,
    )
    for old, new in (
        ("model_config.num_attention_heads % tp_size != 0", "model_config.num_attention_heads % attn_tp_size != 0"),
        ("or model_config.get_total_num_kv_heads() % tp_size != 0", "or model_config.get_total_num_kv_heads() % attn_tp_size != 0"),
        ("adjust_swa_num_heads_if_necessary(model_config, tp_size,", "adjust_swa_num_heads_if_necessary(model_config, attn_tp_size,"),
        (
            "get_num_heads_padding_size(tp_size, weight_block_size, head_dim)",
            "get_num_heads_padding_size(attn_tp_size, weight_block_size, head_dim)",
        ),
        (
            "adjust_tp_num_heads_if_necessary(model_config.hf_config, tp_size, True)",
            "adjust_tp_num_heads_if_necessary(model_config.hf_config, attn_tp_size, True)",
        ),
        ("model_config.hf_config.text_config, tp_size, True", "model_config.hf_config.text_config, attn_tp_size, True"),
    ):
        tree.replace(HEADS, old, new)
    tree.replace(
        f"{RUNNER}.load_model",
        "self.model_config, self.load_config, get_parallel().tp_size\n",
        "self.model_config,\n                self.load_config,\n                get_parallel().tp_size,\n"
        "                attn_tp_size=get_parallel().attn_tp_size,\n",
    )


def rope(tree: EditedTree) -> None:
    tree.replace(ROPE, "    assert rope_scaling is not None\n", "")
    tree.insert_first(
        ROPE,
        """
        if rope_scaling is None or rope_scaling.get("rope_type") != "deepseek_yarn":
            # Nothing of the CPU's own: the native forward of any rope runs there.
            return get_rope(
                head_size,
                rotary_dim,
                max_position,
                base,
                is_neox_style,
                rope_scaling,
                dtype,
                partial_rotary_factor,
            )
        """,
    )


def allocation(tree: EditedTree) -> None:
    tree.replace_in_module(
        ALLOCATION,
        "if _is_cpu:\n    from sgl_kernel import assign_req_to_token_pool_cpu\n",
        "if _is_cpu:\n    try:\n        from sgl_kernel import assign_req_to_token_pool_cpu\n    except ImportError:\n"
        "        assign_req_to_token_pool_cpu = None\n",
    )
    tree.replace_in_module(
        MOVES,
        "if _is_cpu:\n    from sgl_kernel import copy_all_layer_kv_cache_cpu\n",
        "if _is_cpu:\n    try:\n        from sgl_kernel import copy_all_layer_kv_cache_cpu\n    except ImportError:\n"
        "        copy_all_layer_kv_cache_cpu = None\n",
    )
    tree.insert_first(
        f"{MOVES}.copy_all_layer_kv_cache_func",
        """
        if _is_cpu and copy_all_layer_kv_cache_cpu is None:
            raise NotImplementedError(
                "moving KV cache on a CPU needs sgl_kernel, which could not be imported"
            )
        """,
    )
    tree.add_before(ASSIGN, TORCH_ASSIGN)
    tree.insert_first(
        ASSIGN,
        """
        if _is_cpu and assign_req_to_token_pool_cpu is None:
            _assign_req_to_token_pool_torch(
                req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc
            )
            return
        """,
    )


CPU_MODELS: tuple[Contribution, ...] = (
    Contribution(
        name="cpu-heads",
        title="[CPU] Count heads per attention rank when padding them",
        gap="`adjust_config_with_unaligned_cpu_tp` pads attention heads to the tensor-parallel size. With attention data "
        "parallelism every rank holds all heads of its replica: a model with 2 KV heads gets 4 on four ranks, and its weights "
        "do not fit any more.",
        change="The function takes the attention group's size beside `tp_size` and uses it for heads; the model runner passes it. "
        "Without the argument nothing changes.",
        proof="2 KV heads on four ranks stay 2 with attention groups of one, and become 4 with one group of four.",
        closes="the rule that test models have KV heads divisible by the number of instances",
        apply=heads,
    ),
    Contribution(
        name="cpu-rope",
        title="[CPU] Plain rope for models that ask for it through get_rope_wrapper",
        gap="`get_rope_cpu` asserts deepseek_yarn scaling; a DeepSeek model without scaling fails to load on a CPU.",
        change="Any other rope is the one of `get_rope`, whose native forward runs on a CPU.",
        proof="Plain rope through `get_rope_cpu` rotates as `get_rope` does; deepseek_yarn is what it was.",
        closes="the yarn scaling of the DeepSeek test model",
        apply=rope,
    ),
    Contribution(
        name="cpu-allocation",
        title="[CPU] KV allocation without sgl_kernel",
        gap="`mem_cache/allocation.py` and `kernels/ops/kvcache/cache_move.py` import CPU kernels of `sgl_kernel` when they are loaded. "
        "The published package is the CUDA "
        "build: it does not load without a CUDA driver, so no scheduler starts on such a machine.",
        change="The imports may fail; the table is then written by torch, and moving KV cache (speculative decoding) is refused by name.",
        proof="The module loads with `sgl_kernel` missing, and rows of unequal lengths land in the table as the kernel puts them.",
        closes="one reason for the sgl_kernel stand-in (other modules import it, too)",
        apply=allocation,
    ),
)
