"""Eight prompts of 3,500 tokens at once against one after the other, on pools that hold one of them.

    python -m benchmark.serving.pressure [--out benchmark/results/pressure.json]

Reports the slowest of eight concurrent requests over the serial time of all eight. Times are this machine's.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmark.serving.provenance import provenance
from testing.client import Client
from testing.dyncp_grid import INSTANCES, grid_server
from testing.recall import recall_prompt
from testing.server import server_pool

ROOT = Path(__file__).resolve().parents[2]

NUM_PROMPTS, LENGTH = 8, 3500


def measure(client: Client) -> dict[str, float | int]:
    prompts = [recall_prompt(LENGTH, i / NUM_PROMPTS, 70 + i) for i in range(NUM_PROMPTS)]
    started = time.monotonic()
    for prompt in prompts:
        client.generate(prompt.text)
    serial = time.monotonic() - started
    pins = [{"custom_params": {"dyncp": {"home": i % INSTANCES, "degree": INSTANCES}}} for i in range(NUM_PROMPTS)]
    started = time.monotonic()
    with ThreadPoolExecutor(NUM_PROMPTS) as pool:
        answers = list(pool.map(lambda p, pin: client.generate(p.text, sampling=pin), prompts, pins))
    slowest = time.monotonic() - started
    right = sum(a.text == p.answer for a, p in zip(answers, prompts, strict=True))
    return {"serial_s": round(serial, 2), "slowest_s": round(slowest, 2), "ratio": round(slowest / serial, 3), "right": right}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark" / "results" / "pressure.json")
    arguments = parser.parse_args()
    with server_pool(ROOT / "logs") as servers:
        result = measure(servers.get(grid_server("qwen3moe", 16, 256)).client)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(provenance("python -m benchmark.serving.pressure") | result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
