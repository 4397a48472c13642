"""Stand-ins for FlashInfer's wrappers that compute with plain torch. Every call is checked against the real wrapper's signature."""

from __future__ import annotations

import inspect
import math
from typing import Any

import flashinfer
import torch
from flashinfer.mla import BatchMLAPagedAttentionWrapper


def checked(method: Any, call: tuple, given: dict) -> dict:
    """The arguments by the real method's names; TypeError when it would not take them."""
    bound = inspect.signature(inspect.unwrap(method)).bind(None, *call, **given)
    return {name: value for name, value in bound.arguments.items() if name != "self"}


def attend(query, keys, values, scale: float, causal: bool, window_left: int = -1):
    """query [tokens, heads, d], keys [n, kv_heads, d]: a causal query sees keys up to itself, the last query the last key. window_left:
    and from so many before itself on."""
    tokens, heads, _ = query.shape
    group = heads // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    logits = torch.einsum("thd,nhd->thn", query.float(), keys.float()) * scale
    if causal:
        last = torch.arange(tokens) + len(keys) - tokens
        places = torch.arange(len(keys))[None, :]
        hidden = places > last[:, None]
        if window_left >= 0:
            hidden |= places < last[:, None] - window_left
        logits = logits.masked_fill(hidden[:, None, :], float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    return torch.einsum("thn,nhd->thd", torch.softmax(logits, dim=-1), values.float()), lse


def into(arguments: dict, output: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The results, in the caller's tensors where those are given."""
    for name, result in (("out", output), ("lse", lse)):
        given = arguments.get(name)
        assert given is None or (given.shape == result.shape and given.dtype == result.dtype and given.is_contiguous()), name
    given = arguments.get("out"), arguments.get("lse")
    return tuple(result if place is None else place.copy_(result) for place, result in zip(given, (output, lse), strict=True))


class FakePrefill:
    """BatchPrefillWithPagedKVCacheWrapper: page lists, base-2 LSE."""

    real = flashinfer.BatchPrefillWithPagedKVCacheWrapper

    def __init__(self, *call: Any, **given: Any) -> None:
        arguments = checked(self.real.__init__, call, given)
        assert arguments["kv_layout"] == "NHD" and arguments["backend"] == "fa2"

    def plan(self, *call: Any, **given: Any) -> None:
        self.planned = planned = checked(self.real.plan, call, given)
        for name in ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len"):
            assert planned[name].dtype == torch.int32, name
            assert planned[name].device.type == "cpu", "host arrays: a device array would make plan wait"
        assert bool((planned["paged_kv_last_page_len"] > 0).all()), "an empty row comes back as garbage"

    def run(self, *call: Any, **given: Any):
        arguments, planned = checked(self.real.run, call, given), self.planned
        queries, (keys, values) = arguments["q"], arguments["paged_kv_cache"]
        assert len(queries) == planned["qo_indptr"][-1], "the real wrapper refuses another number of queries"
        assert keys.shape[1] == planned["page_size"] and keys.is_contiguous()
        assert (queries.dtype, keys.dtype, values.dtype) == (planned["q_data_type"], *[planned["kv_data_type"]] * 2)
        page_indptr, last = planned["paged_kv_indptr"], planned["paged_kv_last_page_len"]
        lengths = (page_indptr.diff() - 1) * planned["page_size"] + last
        outputs, lses = [], []
        for row, length in enumerate(lengths.tolist()):
            pages = planned["paged_kv_indices"][page_indptr[row] : page_indptr[row + 1]].long()
            span = queries[planned["qo_indptr"][row] : planned["qo_indptr"][row + 1]]
            here, there = (cache.float()[pages].flatten(0, 1)[:length] for cache in (keys, values))
            output, lse = attend(span, here, there, planned["sm_scale"] * arguments["k_scale"], planned["causal"], planned["window_left"])
            outputs.append((output * arguments["v_scale"]).to(queries.dtype))
            lses.append(lse / math.log(2.0))
        assert arguments["return_lse"]
        return into(arguments, torch.cat(outputs), torch.cat(lses))


class FakeMla:
    """BatchMLAPagedAttentionWrapper: natural LSE as asked for."""

    real = BatchMLAPagedAttentionWrapper

    def __init__(self, *call: Any, **given: Any) -> None:
        assert checked(self.real.__init__, call, given)["backend"] == "fa3"

    def plan(self, *call: Any, **given: Any) -> None:
        self.planned = checked(self.real.plan, call, given)
        assert self.planned["lse_mode"] == "basee"

    def run(self, *call: Any, **given: Any):
        arguments, planned = checked(self.real.run, call, given), self.planned
        metadata, queries, cache = planned["metadata"], arguments["query"], arguments["kv_cache"]
        latent = planned["head_dim_ckv"]
        assert cache.shape[1:] == (planned["page_size"], latent + planned["head_dim_kpe"])
        assert queries.shape[1:] == (planned["num_heads"], latent + planned["head_dim_kpe"])
        outputs, lses = [], []
        for row, length in enumerate(metadata.kv_len_arr.tolist()):
            pages = metadata.kv_indices[metadata.kv_indptr[row] : metadata.kv_indptr[row + 1]].long()
            keys = cache[pages].flatten(0, 1)[:length].unsqueeze(1)
            span = queries[metadata.qo_indptr[row] : metadata.qo_indptr[row + 1]]
            output, lse = attend(span, keys, keys[..., :latent], planned["sm_scale"], planned["causal"])
            outputs.append(output.to(queries.dtype))
            lses.append(lse)
        assert arguments["return_lse"] and arguments["return_lse_base_on_e"]
        return into(arguments, torch.cat(outputs), torch.cat(lses))
