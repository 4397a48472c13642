"""A server of ours that benchmark clients are held against: every request in two shards, and what the server says of them itself."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from testing.client import Client
from testing.metrics import parse_metrics
from testing.server import ServerConfig

MODEL = "served"
SHARDS = 2
SERVER = ServerConfig(
    "qwen3moe",
    instances=SHARDS,
    pool_tokens=4096,
    page_size=16,
    chunk_tokens=256,
    dyncp=True,
    flags=("--enable-metrics", "--dyncp-policy", "fixed", "--dyncp-degree", str(SHARDS), "--served-model-name", MODEL),
)
"""No client pins a placement: the policy gives every request all instances."""


@dataclass(frozen=True)
class Books:
    """What a server has counted since its start; the difference of two is a client's run."""

    requests: float
    tokens: float
    first_s: float
    whole_s: float
    sharded: float

    @classmethod
    def of(cls, client: Client) -> Books:
        sums: defaultdict[str, float] = defaultdict(float)
        for sample in parse_metrics(client.metrics()):
            sums[sample.name.removeprefix("sglang:")] += sample.value
        report = client.json("GET", "/dyncp/requests")["requests"]
        return cls(
            requests=sums["e2e_request_latency_seconds_count"],
            tokens=sums["generation_tokens_total"],
            first_s=sums["time_to_first_token_seconds_sum"],
            whole_s=sums["e2e_request_latency_seconds_sum"],
            sharded=sum(entry["degree_end"] == SHARDS for entry in report),
        )

    def since(self, before: Books) -> dict[str, Any]:
        """requests and how many of them were sharded; tokens of an output and seconds between two of them, on the mean."""
        requests, tokens = self.requests - before.requests, self.tokens - before.tokens
        after_first_s = (self.whole_s - before.whole_s) - (self.first_s - before.first_s)
        return {
            "sent": int(requests),
            "sharded": int(self.sharded - before.sharded),
            "output_tokens": tokens / requests if requests else None,
            "token_ms": 1000 * after_first_s / (tokens - requests) if tokens > requests else None,
        }
