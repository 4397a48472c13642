"""Many questions to a few long documents, on real servers with small pools.

    python -m benchmark.serving.conversations.documents --out benchmark/results/documents_served.json

Three servers of four instances, one after the other, are sent the same questions at the same times: `on` (ours with retained sequences, of
which several read one at once), `off` (ours, nothing retained), `stock` (SGLang, a tree per instance, each question where its own balancing
sends it). A document fits a pool, or stock would refuse it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.serving.conversations.run import INSTANCES, KEEPS, server_with
from benchmark.serving.conversations.sessions import VOCABULARY
from benchmark.serving.provenance import ROOT, provenance
from testing.client import Answer, Client
from testing.server import ServerPool, server_pool

SERVERS: dict[str, tuple[str, ...] | None] = {"on": KEEPS, "off": ("--dyncp-cache-fraction", "0"), "stock": None}
QUESTION_TOKENS, ANSWER_TOKENS = 40, 24
MOST_AT_ONCE = 64


@dataclass(frozen=True)
class Question:
    """sent_s: after the beginning."""

    sent_s: float
    prompt: tuple[int, ...]


def choose_questions(args: argparse.Namespace) -> list[Question]:
    """In order of arrival, at random times, to documents drawn evenly."""
    choose, clock, questions = random.Random(args.seed), 0.0, []

    def text(length: int) -> tuple[int, ...]:
        return tuple(choose.choice(VOCABULARY) for _ in range(length))

    documents = [text(args.document_tokens) for _ in range(args.documents)]
    for _ in range(args.questions):
        clock += choose.expovariate(args.rate)
        questions.append(Question(clock, choose.choice(documents) + text(QUESTION_TOKENS)))
    return questions


def ask_all(client: Client, questions: list[Question]) -> list[Answer]:
    """Each at its time, whether or not others are answered."""
    started = time.monotonic()

    def ask(question: Question) -> Answer:
        time.sleep(max(0.0, question.sent_s - (time.monotonic() - started)))
        return client.generate(question.prompt, max_new_tokens=ANSWER_TOKENS, sampling={"ignore_eos": True})

    with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
        return list(pool.map(ask, questions))


def serve(pool: ServerPool, name: str, questions: list[Question], pool_tokens: int) -> dict[str, Any]:
    flags = SERVERS[name]
    client = pool.get(server_with(flags, pool_tokens)).client
    started = time.monotonic()
    answers = ask_all(client, questions)
    seconds = time.monotonic() - started
    found, asked = (sum(answer.meta[key] for answer in answers) for key in ("cached_tokens", "prompt_tokens"))
    row = {
        "hit_share": round(found / asked, 4),
        "ttft_median_s": round(statistics.median(answer.meta["first_token_latency"] for answer in answers), 3),
        "latency_median_s": round(statistics.median(answer.meta["e2e_latency"] for answer in answers), 3),
        "seconds": round(seconds, 1),
    }
    if flags is not None:
        row["sharded"] = round(sum(len(answer.meta["dyncp"]["shards"]) > 1 for answer in answers) / len(answers), 3)
    print(name, row, file=sys.stderr, flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--document-tokens", type=int, default=2_000)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--rate", type=float, default=0.5, help="questions per second, to all documents")
    parser.add_argument("--pool-tokens", type=int, default=3_072, help="KV tokens per instance")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark" / "results" / "documents_served.json")
    args = parser.parse_args()
    questions = choose_questions(args)
    with server_pool(Path("logs")) as pool:
        servers = {name: serve(pool, name, questions, args.pool_tokens) for name in SERVERS}
    names = ("documents", "document_tokens", "questions", "rate", "pool_tokens", "seed")
    settings = {name: getattr(args, name) for name in names} | {"instances": INSTANCES}
    result = provenance("python -m benchmark.serving.conversations.documents") | settings | {"servers": servers}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
