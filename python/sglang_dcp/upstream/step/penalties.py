"""Penalties of a request's earlier tokens, where SGLang's batch would begin to count anew, or count another token.

With the overlap schedule a step is prepared before the result of the one before is there, so SGLang counts the last token but one: the
prompt's last token before the first decode step, then each output token one step late. A row that sat out, and one that starts over, has
all its results; it must count what it would have counted, or that token is lost and the next one counted twice.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sglang_dcp.upstream.step.attached import after
from sglang_dcp.upstream.step.runtime import Runtime


def copy_penalizers(penalizers: Any, batch: Any) -> Any:
    """SGLang's BatchedPenalizerOrchestrator for `batch`, which has the same rows; filtering either leaves the other as it is."""
    copied = copy.copy(penalizers)
    copied.batch = batch
    copied.penalizers = {kind: copy.copy(penalizer) for kind, penalizer in penalizers.penalizers.items()}
    for penalizer in copied.penalizers.values():
        penalizer._orchestrator_ref = weakref.ref(copied)
    return copied


def count_in_turn(original: Callable[[Any], None], batch: Any) -> None:
    """AROUND ScheduleBatch.cumulate_penalty_output_tokens: rows that are back count the token that was their last when they left."""
    hidden = [(req, req.output_ids[-req.dyncp_num_late :]) for req in batch.reqs if req.dyncp_num_late]
    for req, tokens in hidden:
        del req.output_ids[-len(tokens) :]
    try:
        original(batch)
    finally:
        for req, tokens in hidden:
            req.output_ids.extend(tokens)
            req.dyncp_num_late = 0


@after
def count_earlier_output(runtime: Runtime, result: Any, batch: Any) -> None:
    """AFTER ScheduleBatch.prepare_for_extend: a request that starts over brings output tokens along, SGLang counts none of them.

    They are fed to the penalizers one by one, in the chunk that ends the prefill: only its sampling uses them. With the overlap schedule
    the last one is counted by the next step.
    """
    if not any(req.output_ids for req in batch.reqs):
        return
    penalizers = batch.sampling_info.penalizer_orchestrator
    ends = [prefix_len + num_new for prefix_len, num_new in zip(batch.prefix_lens, batch.extend_lens, strict=True)]
    again = [
        bool(req.output_ids) and end == len(req.origin_input_ids) + len(req.output_ids) for req, end in zip(batch.reqs, ends, strict=True)
    ]
    if penalizers.is_required and any(again):
        batch.sampling_info.penalizer_orchestrator = _rebuilt(penalizers, batch, again)


@dataclass(eq=False)
class _Rows:
    """What the penalizers read of a batch."""

    reqs: list[Any]
    device: Any


def _rebuilt(penalizers: Any, batch: Any, again: list[bool]) -> Any:
    """Penalizers of the batch, joined row by row. again: rows whose output tokens count."""
    parts = []
    for req, counts in zip(batch.reqs, again, strict=True):
        rows = _Rows([req], batch.device)
        part = type(penalizers)(vocab_size=penalizers.vocab_size, batch=rows, penalizers=set(penalizers.penalizers))
        if counts and part.is_required:
            counted = [req.origin_input_ids[-1], *req.output_ids[:-1]] if batch.enable_overlap else list(req.output_ids)
            for token in torch.tensor(counted, dtype=torch.int64).to(batch.device).split(1):
                part.cumulate_output_tokens(token)
        parts.append((rows, part))
    joined_rows, joined = parts[0]
    for rows, part in parts[1:]:
        joined.merge(part)
        joined_rows.reqs = joined_rows.reqs + rows.reqs
    joined.batch = batch
    return joined
