"""Many answers at once, as streams, with the moment of every token."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from testing.client import Client

PREFIX = b"data: {"


@dataclass
class Streamed:
    """times: monotonic seconds of each chunk. tokens: all that were generated. meta: meta_info of the last chunk."""

    prompt_tokens: int
    started: float
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def first_token_s(self) -> float:
        return self.times[0] - self.started

    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def stream(client: Client, ids: Sequence[int], new_tokens: int, sampling: dict[str, Any], **fields: Any) -> Streamed:
    """Only the last chunk is parsed: reading must not be slower than a step. fields: further fields of the request."""
    answer, last = Streamed(len(ids), time.monotonic()), b""
    with client.stream(ids, max_new_tokens=new_tokens, sampling={"ignore_eos": True} | sampling, **fields) as opened:
        for line in opened.response:
            if line.startswith(PREFIX):
                answer.times.append(time.monotonic())
                last = line
    if not last:
        raise RuntimeError(f"a prompt of {len(ids)} tokens got no answer")
    event = json.loads(last[len("data: ") :])
    if "error" in event:
        raise RuntimeError(f"a prompt of {len(ids)} tokens was refused: {event['error']}")
    answer.meta = event["meta_info"]
    answer.tokens = int(answer.meta["completion_tokens"])
    if answer.tokens != new_tokens:
        raise RuntimeError(f"a prompt of {len(ids)} tokens got {answer.tokens} of {new_tokens} tokens: {answer.meta.get('finish_reason')}")
    return answer


def stream_all(client: Client, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Streamed]:
    """All at once. On an error (or the part's time limit) the rest is left to end with its server."""
    pool = ThreadPoolExecutor(len(prompts))
    try:
        return list(pool.map(lambda ids: stream(client, ids, new_tokens, {}), prompts))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def decode_window(answers: Sequence[Streamed], *, least_tokens: int) -> dict[str, float]:
    """The time in which all decode: from the last first token to the first last token. Raises ValueError when it is too short.

    step_ms: its length over the mean number of tokens of a request in it.
    """
    begin, end = max(answer.times[0] for answer in answers), min(answer.times[-1] for answer in answers)
    counts = [
        sum(begin < moment <= end for moment in answer.times) * (answer.tokens - 1) / max(1, len(answer.times) - 1) for answer in answers
    ]
    if end <= begin or statistics.mean(counts) < least_tokens:
        raise ValueError(
            f"all {len(answers)} requests decoded together for {end - begin:.2f} s and {statistics.mean(counts):.0f} tokens, fewer than "
            f"{least_tokens}: prefill took as long as decoding; more output tokens are needed"
        )
    mean = statistics.mean(counts)
    return {"window_s": round(end - begin, 3), "window_tokens": round(mean, 1), "step_ms": round((end - begin) / mean * 1000, 4)}


def placement(answer: Streamed) -> tuple[int, list[tuple[int, int]]]:
    """(home, shards) of a served request: meta_info.dyncp, else SGLang's data-parallel rank."""
    tokens = answer.prompt_tokens + answer.tokens
    if (where := answer.meta.get("dyncp")) is not None:
        return int(where["home"]), [(int(shard["rank"]), int(shard["tokens"])) for shard in where["shards"]]
    rank = int(answer.meta.get("dp_rank") or 0)
    return rank, [(rank, tokens)]
