"""The headline's judgements: which rate is held, where a limit is crossed, what is divided by what; and what the client measures."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest
from aiohttp import web

from benchmark.headline.client import Arrival, Served, send_all
from benchmark.headline.contenders import contenders
from benchmark.headline.judge import highest_rate, holds, percentile, point, ratios
from benchmark.headline.traffic import arrivals


def served(tpot_ms: float, *, wait_s: float = 0.1, error: str | None = None) -> Served:
    return Served(Arrival(0.0, 10, 11), 0.0, wait_s, wait_s + tpot_ms / 100, 10, 1, error)


def at(rate: float, p99: float, **changes: Any) -> dict[str, Any]:
    return {"requests_per_s": rate, "p99_tpot_ms": p99, "p99_ttft_s": 0.1, "failed": {}} | changes


def test_a_point_leaves_out_the_first_tenth_and_counts_failures_anywhere() -> None:
    found = point([served(900.0, error="gone")] + [served(float(ms)) for ms in range(1, 20)], 4.0, [1.0, 2.0])
    assert found["p99_tpot_ms"] == 19.0 and found["p50_tpot_ms"] == pytest.approx(10.0, abs=1.0)
    assert found["failed"] == {"gone": 1} and found["kv_max_over_mean"] == 1.5 and found["requests"] == 20


def test_percentiles_are_values_that_were_seen() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0 and percentile(list(range(1, 101)), 0.99) == 99
    assert math.isnan(percentile([], 0.5))


def test_a_growing_queue_or_a_failure_is_not_held() -> None:
    assert holds(at(4, 20.0), 20.0)
    assert not holds(at(4, 20.1), 20.0) and not holds(at(4, 5.0, p99_ttft_s=11.0), 20.0) and not holds(at(4, 5.0, failed={"x": 1}), 20.0)


def test_the_highest_rate_is_interpolated_where_the_limit_is_crossed() -> None:
    assert highest_rate([at(8, 30.0), at(4, 10.0), at(6, 20.0)], 25.0) == 7.0
    assert highest_rate([at(4, 10.0), at(6, 20.0)], 25.0) == 6.0
    assert highest_rate([at(4, 30.0)], 25.0) == 0.0
    assert highest_rate([at(4, 10.0), at(6, 12.0, p99_ttft_s=40.0)], 25.0) == 4.0


def test_ratios_are_of_our_rate_and_of_stocks_p99_at_its_highest_rate() -> None:
    points = {"stock": [at(4, 10.0), at(6, 40.0)], "whole": [at(4, 10.0), at(6, 25.0)], "ours": [at(4, 8.0), at(6, 10.0), at(8, 25.0)]}
    found = ratios(points, 25.0)
    assert found["rates"] == {"stock": 5.0, "whole": 6.0, "ours": 8.0}
    assert found["rate_over_stock"] == 1.6 and found["rate_over_whole"] == pytest.approx(1.333) and found["p99_over_stock"] == 1.25
    assert "rate_over_length_buckets" not in found


def test_all_contenders_get_equal_arrivals_and_a_faster_rate_the_same_requests_sooner() -> None:
    slow, fast = arrivals(0.03, 4.0, 30.0, 1, 50_000), arrivals(0.03, 8.0, 15.0, 1, 50_000)
    assert [(a.prompt_tokens, a.output_tokens) for a in slow] == [(a.prompt_tokens, a.output_tokens) for a in fast]
    assert max(a.prompt_tokens for a in slow) <= 50_000 and slow == arrivals(0.03, 4.0, 30.0, 1, 50_000)


def test_only_ours_runs_our_package_and_all_skip_prefills_in_the_same_way() -> None:
    known = contenders(2)
    assert {name for name, one in known.items() if not one.dyncp} == {"stock", "static-dcp"}
    assert all("fake" in one.flags and one.fields for one in known.values())


def test_the_client_counts_what_comes_between_the_first_and_the_last_chunk() -> None:
    async def generate(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if len(body["input_ids"]) == 13:
            return web.Response(status=400, text="no")
        response = web.StreamResponse()
        await response.prepare(request)
        total = body["sampling_params"]["max_new_tokens"] - (len(body["input_ids"]) == 7)
        for count in (1, total):
            await response.write(b"data: " + json.dumps({"meta_info": {"completion_tokens": count}}).encode() + b"\n\n")
            await asyncio.sleep(0.05)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def run() -> list[Served]:
        app = web.Application()
        app.router.add_post("/generate", generate)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        try:
            asked = [Arrival(0.0, 5, 6), Arrival(0.01, 7, 6), Arrival(0.02, 13, 6)]
            return await send_all(f"http://127.0.0.1:{port}", asked, seed=1, timeout_s=10)
        finally:
            await runner.cleanup()

    whole, short, refused = asyncio.run(run())
    assert whole.error is None and whole.tokens == 5 and whole.tpot_ms is not None and whole.tpot_ms > 5
    assert short.error is not None and short.error.startswith("5 of 6 tokens")
    assert refused.error == "HTTP 400: no" and refused.tpot_ms is None
