"""What --enable-dyncp costs when no request is sharded: paired decode step times of the same requests, stock against ours.

    python -m benchmark.serving.unused [--pairs 2] [--out benchmark/results/unused.json]

Two instances; each server decodes the same 8 requests to the same length several times. Servers alternate: stock, ours, stock, ours ...
The ratio of a pair is that of the medians; nothing judges it, times are this machine's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmark.serving.provenance import provenance
from testing.client import Client
from testing.recall import random_ids
from testing.server import ServerConfig, server_pool

ROOT = Path(__file__).resolve().parents[2]

INSTANCES, REQUESTS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 2, 8, 64, 160, 6


def server_config(*, dyncp: bool) -> ServerConfig:
    return ServerConfig("qwen3moe", INSTANCES, pool_tokens=4096, page_size=16, chunk_tokens=256, dyncp=dyncp)


def decode_once(client: Client, seed: int) -> float:
    """Milliseconds per decode step: all requests run from their first token to their last at the same time."""
    prompts = [random_ids(PROMPT_TOKENS, seed=seed + index) for index in range(REQUESTS)]

    def ask(index: int) -> int:
        answer = client.generate(prompts[index], max_new_tokens=NEW_TOKENS, sampling={"ignore_eos": True}, routed_dp_rank=index % INSTANCES)
        return len(answer.ids)

    started = time.perf_counter()
    with ThreadPoolExecutor(REQUESTS) as pool:
        lengths = list(pool.map(ask, range(REQUESTS)))
    if lengths != [NEW_TOKENS] * REQUESTS:
        raise RuntimeError(f"outputs of {lengths} tokens, expected {NEW_TOKENS} each")
    return (time.perf_counter() - started) * 1000 / NEW_TOKENS


def measure(client: Client) -> list[float]:
    decode_once(client, seed=0)
    return [round(decode_once(client, seed=1000 * (number + 1)), 3) for number in range(ROUNDS)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark" / "results" / "unused.json")
    arguments = parser.parse_args()
    pairs: list[dict[str, Any]] = []
    with server_pool(ROOT / "logs") as servers:
        for _ in range(arguments.pairs):
            stock = measure(servers.get(server_config(dyncp=False)).client)
            ours = measure(servers.get(server_config(dyncp=True)).client)
            ratio = statistics.median(ours) / statistics.median(stock)
            pairs.append({"stock_ms": stock, "dyncp_ms": ours, "ratio": round(ratio, 4)})
            print(json.dumps(pairs[-1]), flush=True)
    ratios = [pair["ratio"] for pair in pairs]
    command = f"python -m benchmark.serving.unused --pairs {arguments.pairs}"
    report = provenance(command) | {"step_time_ratio": round(statistics.mean(ratios), 4), "pairs": pairs}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"step time, ours over stock: {report['step_time_ratio']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
