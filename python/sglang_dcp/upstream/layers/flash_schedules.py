"""Decodes in which nobody is sharded, under SGLang's FlashAttention 3 backend: scheduled ahead of the layers, as we do for graphs with
sharded rows.

SGLang can schedule ahead of the layers itself, with the library's rule, but not under data-parallel attention: its number of parts is of
the longest row, so a captured graph may be replayed with more than it has room for. Ours is of the GPU alone.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_dcp.dataflow.attention.flash_schedule import FEWEST_ROWS, FlashSchedule, check_layout, schedule_on
from sglang_dcp.dataflow.attention.flash_splits import has_causal_schedule, has_one_tile, splits_of

PREPARED_ROWS = tuple(FEWEST_ROWS << doubling for doubling in range(4))
"""Sizes that device code is built for when the server starts; a step of more rows is left to the library."""


class FlashSchedules:
    """In place of FlashAttentionBackend._compute_scheduler_metadata: the argument for a step's rows, valid until the next step."""

    def __init__(self, kv_heads: int, head_dim: int, kv_dtype: torch.dtype, device: torch.device | str) -> None:
        self._of_step = kv_heads, kv_dtype
        self._causal, self._device = has_causal_schedule(head_dim), device
        self._of_rows: dict[int, FlashSchedule] = {}
        for rows in PREPARED_ROWS:
            self._schedule(rows).plan(torch.zeros(rows, dtype=torch.int32, device=device))

    def __call__(self, rows: int, longest: int, lengths: torch.Tensor, query_starts: torch.Tensor | None) -> torch.Tensor | None:
        """lengths int32 [rows]. None: the library shall do it, in every layer."""
        if not 0 < rows <= PREPARED_ROWS[-1]:
            return None  # an instance without requests takes part in the step
        schedule = self._schedule(rows)
        schedule.plan(lengths)
        return schedule.metadata

    def _schedule(self, rows: int) -> FlashSchedule:
        schedule = self._of_rows.get(rows)
        if schedule is None:
            schedule = self._of_rows[rows] = schedule_on(self._device, rows, *self._of_step, causal=self._causal)
        return schedule


def schedule_ahead(backend: Any, device: str) -> None:
    """backend: SGLang's FlashAttentionBackend, before its first capture."""
    backend.decode_num_splits = splits_of(device, backend.num_kv_heads, own_split=True)
    if not has_one_tile(backend.num_attention_heads, backend.num_kv_heads):
        backend._disable_scheduler_metadata_precompute = True  # its own schedules are for another number of parts
        return
    heads = backend.num_attention_heads, backend.num_kv_heads, backend.head_dim
    check_layout(*heads, backend.kv_cache_dtype, backend.page_size, has_causal_schedule(backend.head_dim), device)
    backend._compute_scheduler_metadata = FlashSchedules(backend.num_kv_heads, backend.head_dim, backend.kv_cache_dtype, device)
