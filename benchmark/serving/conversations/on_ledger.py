"""The same sessions on the protocol alone: participants, admission and retention as they are served, no model and no HTTP.

    python -m benchmark.serving.conversations.on_ledger weka_claude_code_dev.parquet --out benchmark/results/conversations_ledger.json

Every turn is placed by the simulator's router and runs in steps of `--step-seconds`. Stands between simulator and server: what the ledger's
own rules cost shows here, in seconds. Whole turns find nothing: their cache is SGLang's tree, which is not here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmark.serving.conversations.closed_loop import ServedTurn, hit_share
from benchmark.serving.conversations.misses import missed_shares
from benchmark.serving.conversations.run import INSTANCES, simulate, simulated_cost
from benchmark.serving.conversations.sessions import PAGE_TOKENS, TOKENS_PER_SERVED, Session, choose_sessions, prompt_ids, served_output
from benchmark.serving.provenance import ROOT, provenance
from sglang_dcp.conversations.router import Router
from sglang_dcp.conversations.turns import BLOCK_TOKENS, Turn
from sglang_dcp.policy.placement import make_policy
from sglang_dcp.policy.types import Placement
from testing.protocol.fakes import ModelRequest
from testing.protocol.model import ProtocolModel

NEVER = 1 << 60


@dataclass
class Speaker:
    """One open session: its next turn begins at `due_s`, or is under way since `sent_s`."""

    session: Session
    due_s: float
    index: int = 0
    sent_s: float = 0.0
    turn: Turn | None = None
    request: ModelRequest | None = None


class LedgerReplay:
    """converse() is closed_loop.converse on the model; time is the number of steps."""

    def __init__(self, pool_tokens: int, divide: int, step_s: float) -> None:
        cost = simulated_cost()
        policy = make_policy(
            "dual-balance",
            num_instances=INSTANCES,
            page_size=BLOCK_TOKENS,
            cost_model=cost,
            degree=None,
            max_degree=INSTANCES,
            max_guest_fraction=1.0,
        )
        served = pool_tokens * TOKENS_PER_SERVED
        self.router = Router(policy, cost, INSTANCES, served, seed=1, divide=divide // TOKENS_PER_SERVED, spreads=False)
        pages = pool_tokens // PAGE_TOKENS
        self.model = ProtocolModel(1, INSTANCES, pages, PAGE_TOKENS, chunk_tokens=256, cache_fraction=1.0, check_every=NEVER)
        self.step_s, self.now = step_s, 0.0
        self.served: list[ServedTurn] = []

    def converse(self, sessions: Sequence[Session], at_once: int) -> list[ServedTurn]:
        todo = list(reversed(sessions))
        speakers = [Speaker(todo.pop(), 0.2 * place) for place in range(min(at_once, len(todo)))]
        while speakers:
            for speaker in list(speakers):
                if speaker.request is None and self.now >= speaker.due_s:
                    self._send(speaker)
                elif speaker.request is not None and speaker.request.finished_in_step is not None and not self._end(speaker):
                    speakers.remove(speaker)
                    if todo:
                        speakers.append(Speaker(todo.pop(), self.now))
            self.model.step()
            self.now += self.step_s
        return sorted(self.served, key=lambda turn: turn.sent_s)

    def _send(self, speaker: Speaker) -> None:
        session, index = speaker.session, speaker.index
        speaker.turn = turn = replace(session.turns[index], conversation=session.number, arrival_s=self.now)
        placement, ids = self.router.place(turn), prompt_ids(session, index)
        speaker.sent_s = self.now
        speaker.request = self.model.arrive(placement.home, ids, served_output(turn), flexible=True)
        heads = [max(1, tokens // TOKENS_PER_SERVED) for tokens in placement.shard_tokens[:-1]]
        speaker.request.dyncp_placement = Placement(placement.home, placement.shards, (*heads, len(ids) - sum(heads)))

    def _end(self, speaker: Speaker) -> bool:
        """Whether the session goes on."""
        request, turn = speaker.request, speaker.turn
        assert request is not None and turn is not None and request.dyncp_placement is not None
        self.router.finish(turn)
        cached, where = request.prefix_len if request.was_managed else 0, request.dyncp_placement
        tokens = len(request.origin_input_ids)
        number = speaker.session.number
        self.served.append(ServedTurn(number, speaker.index, speaker.sent_s, self.now, tokens, cached, where.home, where.shards))
        speaker.index, speaker.request = speaker.index + 1, None
        if speaker.index == len(speaker.session.turns):
            return False
        speaker.due_s = self.now + speaker.session.think_s[speaker.index]
        return True

    def evictions(self) -> dict[str, int]:
        totals: Counter[str] = Counter()
        for home in self.model.homes:
            totals.update(home.participant.retention.counters.evictions)
        return dict(totals)


def measure(args: argparse.Namespace, pool_tokens: int, seed: int) -> dict[str, Any]:
    wanted = {"count": args.sessions, "num_turns": args.turns, "hurry": args.hurry}
    sessions = choose_sessions(args.trace, divide=args.divide, pool_tokens=pool_tokens, seed=seed, **wanted)
    replay = LedgerReplay(pool_tokens, args.divide, args.step_seconds)
    served = replay.converse(sessions, args.at_once)
    simulated = simulate(sessions, served, pool_tokens, args.divide)
    found = hit_share(served)
    return {
        "pool_tokens": pool_tokens,
        "seed": seed,
        "hit_share": found,
        "whole_share": round(sum(t.prompt_tokens for t in served if len(t.shards) == 1) / sum(t.prompt_tokens for t in served), 4),
        "missed": missed_shares(sessions, served),
        "evictions": replay.evictions(),
        "simulated": simulated,
        "of_bound": round(found / simulated["pooled"], 4),
        "over_sticky": round(found / simulated["sticky"], 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument(
        "--pool-tokens", type=int, action="append", help="KV tokens per instance; repeat for several (default 3072 and 4096)"
    )
    parser.add_argument("--seed", type=int, action="append", help="repeat for several (default 1, 2 and 3)")
    parser.add_argument("--divide", type=int, default=128)
    parser.add_argument("--hurry", type=float, default=6.0)
    parser.add_argument("--sessions", type=int, default=30)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--at-once", type=int, default=24)
    parser.add_argument("--step-seconds", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark" / "results" / "conversations_ledger.json")
    args = parser.parse_args()
    rows = [measure(args, pool, seed) for pool in args.pool_tokens or (3072, 4096) for seed in args.seed or (1, 2, 3)]
    result = provenance(f"python -m benchmark.serving.conversations.on_ledger {args.trace.name}") | {"instances": INSTANCES, "rows": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
