"""Many questions to the same long documents, of which several read one prefix at once.

    python -m benchmark.simulate.conversations.documents --out benchmark/results/documents_simulated.json

`ours` keeps one copy of a document at its home, which later questions and those of the same time read; `shared` is the bound, one tree over
all pools.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np

from benchmark.serving.provenance import ROOT, provenance
from benchmark.simulate.conversations.run import simulate
from sglang_dcp.conversations.turns import BLOCK_TOKENS, Turn
from sglang_dcp.policy.cost_model import load_cost_model

DOCUMENT_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 200_000, 512, 256
SERVICE_S = 6.0
COLUMNS = ("sticky", "ours", "shared")
FIRST_OF_A_QUESTION = 1 << 20
"""Block ids below it are a document's."""


def questions(num_documents: int, count: int, rate: float, seed: int) -> list[Turn]:
    """In order of arrival, to documents drawn evenly. A question is nobody else's."""
    choose, clock, turns = random.Random(seed), 0.0, []
    document = np.arange(DOCUMENT_TOKENS // BLOCK_TOKENS)
    num_own = QUESTION_TOKENS // BLOCK_TOKENS
    for number in range(count):
        clock += choose.expovariate(rate)
        own = FIRST_OF_A_QUESTION + num_own * number + np.arange(num_own)
        blocks = np.concatenate([document, own])
        turns.append(Turn(clock, choose.randrange(num_documents), len(blocks) * BLOCK_TOKENS, ANSWER_TOKENS, SERVICE_S, blocks))
    return turns


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost-model", default="deepseek-v3.h200")
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--pool-tokens", type=int, default=1_100_000)
    parser.add_argument("--questions", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=1.0, help="questions per second, to all documents")
    parser.add_argument("--documents", type=int, action="append", help="repeat for several (default 1, 4 and 16)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark" / "results" / "documents_simulated.json")
    args = parser.parse_args()
    cost, rows = load_cost_model(args.cost_model, args.instances), []
    for count in args.documents or (1, 4, 16):
        turns = questions(count, args.questions, args.rate, seed=1)
        for row in simulate(turns, cost, args.instances, [args.pool_tokens], COLUMNS, seed=1, divide=1):
            rows.append({"documents": count} | row)
    settings = {"cost_model": args.cost_model, "instances": args.instances, "rate": args.rate, "questions": args.questions}
    result = provenance("python -m benchmark.simulate.conversations.documents") | settings | {"rows": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
