"""Moving pages while decoding: applies `policy/rebalance.py` before a step and says what the copy costs."""

from __future__ import annotations

from benchmark.simulate.cluster import Cluster
from benchmark.simulate.results import Recorder
from sglang_dcp.policy.cost_model import CostModel
from sglang_dcp.policy.rebalance import Held, choose_move

# 70,272 B of KV per token (MLA, 61 layers) at the 361 GB/s of the exchange, rounded up. Nothing is hidden behind the step.
MOVE_US_PER_TOKEN = 0.2
MAX_TOKENS_PER_STEP = 8192


def move_pages(cluster: Cluster, cost: CostModel, recorder: Recorder, *, page_size: int, step: int) -> float:
    """Makes at most one move; returns the seconds that the step lasts longer."""
    size = page_size
    levels = (cost.attention_us_per_token * cluster.kv_tokens + cost.dispatch_us_per_request * cluster.batch).tolist()
    hottest = levels.index(max(levels))
    held = [
        Held(request.identity, request.home, request.pages)
        for request in cluster.residents[hottest].values()
        if request.finish_step >= 0 and request.pages[hottest] > 1
    ]
    rooms = [min(free, load.free_tokens // size) for free, load in zip(cluster.free_pages, cluster.loads, strict=True)]
    most = MAX_TOKENS_PER_STEP // size
    move = choose_move(levels, cluster.nodes, rooms, held, cost, size, max_pages=most, move_us_per_token=MOVE_US_PER_TOKEN)
    if move is None:
        return 0.0
    request = cluster.residents[move.source][move.identity]
    cluster.settle(request, step)
    # The tail keeps its partial page: what moves are full pages.
    full = request.tokens[move.source] // size
    pages = min(move.num_pages, full - (move.source == request.tail))
    if pages < 1:
        return 0.0
    cluster.move_pages(request, move.source, move.target, pages)
    recorder.num_moved_tokens += pages * size
    return pages * size * MOVE_US_PER_TOKEN * 1e-6
