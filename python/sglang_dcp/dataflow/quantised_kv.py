"""K/V in a quantised pool's element type, made at home ahead of the trip: what every shard writes are the bytes that the home made."""

from __future__ import annotations

import dataclasses

import torch

from sglang_dcp.dataflow.contracts import KVScales, NewKV


def quantised(rows: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """rows / scale in `dtype`, as SGLang's pools make it, but in a tensor of its own: theirs divide the caller's."""
    return (rows / scale if scale != 1.0 else rows).to(dtype)


def with_quantised(new_kv: NewKV, scales: KVScales, dtype: torch.dtype, *, attend_stored: bool = False) -> NewKV:
    """The same K/V with what a pool of `dtype` stores of it; as it is where that is its own type.

    attend_stored: a chunk's own tokens attend what is stored, as if they read it back.
    """
    if new_kv.keys.dtype == dtype:
        return new_kv
    keys = quantised(new_kv.keys, scales.key, dtype)
    values = keys[..., : new_kv.values.shape[-1]] if new_kv.latent else quantised(new_kv.values, scales.value, dtype)
    stored = NewKV(keys, values, new_kv.latent)
    if not attend_stored:
        return dataclasses.replace(new_kv, quantised=stored)
    attended = keys.to(new_kv.keys.dtype) * scales.key
    read_back = attended[..., : new_kv.values.shape[-1]] if new_kv.latent else values.to(new_kv.values.dtype) * scales.value
    return NewKV(attended, read_back, new_kv.latent, quantised=stored)
