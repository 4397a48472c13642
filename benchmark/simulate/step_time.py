"""How long a simulated step takes: decode, and the prefill chunks beside it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from benchmark.simulate.cluster import Cluster, SimulatedRequest
from sglang_dcp.policy.cost_model import CostModel, InstanceWork, unsplit_tokens


def decode_us(cluster: Cluster, cost: CostModel, num_running: int) -> float:
    """The cost model's step_us on arrays; a test holds the two equal."""
    level = cost.attention_us_per_token * cluster.kv_tokens
    if cost.attention_us_per_unsplit_token:
        level = np.maximum(level, cost.attention_us_per_unsplit_token * _unsplit_tokens(cluster, cost.attention_chunks))
    level += cost.attention_us_per_row * cluster.rows
    level += cost.dispatch_us_per_request * cluster.batch
    layer = cost.constant_layer_us
    if cluster.num_routed:
        rows = np.maximum(cluster.routed[0], cluster.routed[1])
        layer += cost.exchange_fixed_us
        if cluster.num_remote:
            remote = np.maximum(cluster.routed[2], cluster.routed[3])
            level += cost.exchange_us_per_row * (rows - np.minimum(rows, remote)) + cost.remote_exchange_us_per_row * remote
            layer += cost.remote_exchange_fixed_us
        else:
            level += cost.exchange_us_per_row * rows
    layer += float(level.max()) + cost.expert_us(num_running)
    layer += cost.combine_us_per_request * float(cluster.batch.max())
    return max(cost.num_layers * layer + cost.step_fixed_us, cost.host_step_us) + _sharded_host_us(cluster, cost)


def _sharded_host_us(cluster: Cluster, cost: CostModel) -> float:
    rows = float(cluster.routed[:2].max())
    return cost.sharded_step_fixed_us + cost.sharded_step_us_per_row * rows if rows else 0.0


def _unsplit_tokens(cluster: Cluster, chunks: int) -> np.ndarray:
    """Of every instance, as unsplit_tokens; a graph has as many rows as there are, and a tail as many tokens as were booked last."""
    longest = [max((request.tokens[rank] for request in held.values()), default=0) for rank, held in enumerate(cluster.residents)]
    work = zip(cluster.kv_tokens.tolist(), cluster.rows.tolist(), longest, strict=True)
    return np.array([unsplit_tokens(InstanceWork(int(tokens), int(rows), 0, longest_row=row), chunks) for tokens, rows, row in work])


def run_chunks(queues: Iterable[deque[SimulatedRequest]], chunk_tokens: int, cost: CostModel) -> tuple[float, list[SimulatedRequest]]:
    """One chunk on every home with a prompt waiting. (Microseconds of the longest, which delays the step; the requests whose prompts
    ended, which leave their queue and decode from the next step on.)"""
    longest, ended = 0.0, []
    for queue in queues:
        budget, spent = chunk_tokens, 0.0
        while queue and budget > 0:
            request = queue[0]
            tokens = min(budget, request.prefill_left)
            context = request.prompt + request.decoded - request.prefill_left + tokens / 2
            spent += tokens * cost.prefill_us_per_token
            spent += tokens * context * cost.prefill_attention_us_per_token_context / len(request.pages)
            request.prefill_left -= tokens
            budget -= tokens
            if request.prefill_left == 0:
                ended.append(queue.popleft())
        longest = max(longest, spent)
    return longest, ended
