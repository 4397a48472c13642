"""Sends requests at their arrival times and notes when the first and the last token of each came: an open loop, one process."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

PREFIX = b"data: {"
VOCABULARY = 256
"""Ids of the test tokenizer, which the models with real layers use."""


@dataclass(frozen=True)
class Arrival:
    """at_s: seconds after the start. Lengths in tokens."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass
class Served:
    """What became of an arrival. Times in seconds after the start; tokens counts those between first_s and last_s, event_s has when each
    event of the stream came."""

    arrival: Arrival
    sent_s: float = 0.0
    first_s: float | None = None
    last_s: float | None = None
    tokens: int = 0
    degree: int = 1
    error: str | None = None
    event_s: list[float] = field(default_factory=list)

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per output token after the first chunk; None where there was no second one."""
        if self.first_s is None or self.last_s is None or self.tokens < 1:
            return None
        return (self.last_s - self.first_s) / self.tokens * 1000


async def send_all(
    url: str, arrivals: Sequence[Arrival], *, seed: int, timeout_s: float, fields: Mapping[str, Any] | None = None
) -> list[Served]:
    """Every arrival's outcome, in order. `timeout_s` bounds each request; what exceeds it has an error. fields: of every request."""
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=1 << 22) as session:
        began = time.monotonic()
        tasks = []
        for index, arrival in enumerate(arrivals):
            body = _body(arrival, seed * 1_000_003 + index, fields or {})
            await asyncio.sleep(max(0.0, began + arrival.at_s - time.monotonic()))
            tasks.append(asyncio.create_task(_send(session, url, body, Served(arrival), began)))
        return await asyncio.gather(*tasks)


def _body(arrival: Arrival, seed: int, fields: Mapping[str, Any]) -> bytes:
    rng = random.Random(seed)
    sampling = {"temperature": 0, "max_new_tokens": arrival.output_tokens, "ignore_eos": True}
    ids = rng.choices(range(VOCABULARY), k=arrival.prompt_tokens)
    return json.dumps({"input_ids": ids, "sampling_params": sampling, "stream": True, **fields}).encode()


async def _send(session: aiohttp.ClientSession, url: str, body: bytes, served: Served, began: float) -> Served:
    served.sent_s = time.monotonic() - began
    first = last = b""
    try:
        async with session.post(f"{url}/generate", data=body, headers={"Content-Type": "application/json"}) as response:
            if response.status != 200:
                served.error = f"HTTP {response.status}: {(await response.text())[:300]}"
                return served
            async for line in response.content:
                if line.startswith(PREFIX):
                    served.last_s = time.monotonic() - began
                    served.event_s.append(served.last_s)
                    if not first:
                        first, served.first_s = line, served.last_s
                    last = line
    except (aiohttp.ClientError, TimeoutError) as error:
        served.error = f"{type(error).__name__}: {error}"
        return served
    _finish(served, first, last)
    return served


def _finish(served: Served, first: bytes, last: bytes) -> None:
    events: list[dict[str, Any]] = [json.loads(line[len("data: ") :]) for line in (first, last) if line]
    wrong = next((event["error"] for event in events if "error" in event), None)
    if not events or wrong is not None:
        served.error = f"no answer: {wrong}"
        return
    counts = [int(event["meta_info"]["completion_tokens"]) for event in events]
    served.tokens = counts[-1] - counts[0]
    served.degree = int(events[-1]["meta_info"].get("dyncp", {}).get("degree_end", 1))
    if counts[-1] != served.arrival.output_tokens:
        served.error = f"{counts[-1]} of {served.arrival.output_tokens} tokens: {events[-1]['meta_info'].get('finish_reason')}"
