"""SGLang plugin for tests: gpt-oss on any CPU, where SGLang has it with kernels of Intel's matrix extension alone. Stock and ours get the
same.

Attention with sinks is written down here once more and shares no code with the overlay: what is sharded is compared with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BACKEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.models.gpt_oss.GptOssForCausalLM.__init__", _build, HookType.BEFORE)
    HookRegistry.register(f"{BACKEND}.forward_extend", _attend, HookType.AROUND)
    HookRegistry.register(f"{BACKEND}.forward_decode", _attend, HookType.AROUND)
    accept_torch_native()


def accept_torch_native() -> None:
    """SGLang asserts the backend's name for this model. Not by a hook of its registry, which would change all that ask for the name."""
    from sglang.srt.arg_groups import model_hook

    backends_of = model_hook.attention_backends_of
    model_hook.attention_backends_of = lambda view: tuple("intel_amx" if name == "torch_native" else name for name in backends_of(view))


def _build(_model: Any, config: Any, *_args: Any, **_kwargs: Any) -> None:
    """In the server's own type: SGLang builds attention and router in the checkpoint's, whatever --dtype says."""
    config.dtype = torch.get_default_dtype()


def _attend(
    original: Callable[..., torch.Tensor],
    backend: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: Any,
    batch: Any,
    save_kv_cache: bool = True,
    sinks: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """q [tokens, heads * dim]; k, v [tokens, kv heads * dim]. Returns [tokens, heads * dim]. Rows that only pad a batch get zeros."""
    if sinks is None:
        return original(backend, q, k, v, layer, batch, save_kv_cache=save_kv_cache, **kwargs)
    if save_kv_cache and k is not None:
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        backend.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, backend.swa_out_cache_loc), k, v)
    keys = backend.token_to_kv_pool.get_key_buffer(layer.layer_id)
    values = backend.token_to_kv_pool.get_value_buffer(layer.layer_id)
    queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
    output = torch.zeros_like(queries)
    lengths = batch.seq_lens.tolist()
    new = [1] * len(lengths) if batch.forward_mode.is_decode() else batch.extend_seq_lens.tolist()
    first = 0
    for row, length, count in zip(batch.req_pool_indices.tolist(), lengths, new, strict=True):
        slots = backend.req_to_token_pool.req_to_token[row, :length].long()
        own = slice(first, first + count)
        window = layer.sliding_window_size
        output[own] = attend_with_sinks(queries[own], keys[slots], values[slots], sinks, layer.scaling, window)
        first += count
    return output.reshape(q.shape[0], -1)


def attend_with_sinks(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sinks: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Queries [n, heads, dim] of the last n of the tokens whose keys and values [tokens, kv heads, dim] are. sinks [heads]: a further
    logit of each head, of no value. window: how many tokens before itself a token sees; None or negative: all. Returns [n, heads, dim]."""
    tokens, heads = keys.shape[0], queries.shape[1]
    keys, values = (part.float().repeat_interleave(heads // part.shape[1], dim=1) for part in (keys, values))
    logits = torch.einsum("nhd,thd->hnt", queries.float(), keys) * scale
    places = torch.arange(tokens)
    distance = places[-len(queries) :, None] - places
    hidden = distance < 0 if window is None or window < 0 else (distance < 0) | (distance > window)
    logits = logits.masked_fill(hidden, float("-inf"))
    with_sink = torch.cat([logits, sinks.float()[:, None, None].expand(-1, len(queries), 1)], dim=-1)
    weights = torch.softmax(with_sink, dim=-1)[..., :-1]
    return torch.einsum("hnt,thd->nhd", weights, values).to(queries.dtype)
