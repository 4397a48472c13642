"""Why a prompt's beginning was computed again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from benchmark.serving.conversations.closed_loop import ServedTurn
from benchmark.serving.conversations.sessions import PAGE_TOKENS, Session
from sglang_dcp.conversations.turns import common_blocks

REASONS = ("first", "new", "elsewhere", "gone", "part")


def missed_shares(sessions: Sequence[Session], served: Sequence[ServedTurn]) -> dict[str, float]:
    """Shares of all prompt tokens by reason. first: no earlier turn began alike. new: behind what any earlier turn had. elsewhere: an
    earlier turn had it, at another home. gone: it was at this home, and nothing was found. part: less was found than there had been.

    The best earlier turn of the same session counts, by whole pages.
    """
    by_number = {session.number: session for session in sessions}
    earlier: dict[int, list[ServedTurn]] = {}
    missed: Counter[str] = Counter()
    for turn in sorted(served, key=lambda each: each.sent_s):
        before = earlier.setdefault(turn.session, [])
        best, home = _best(by_number[turn.session], turn, before)
        possible = min(best, (turn.prompt_tokens - 1) // PAGE_TOKENS * PAGE_TOKENS)
        missed["new" if possible else "first"] += turn.prompt_tokens - max(possible, turn.cached_tokens)
        lost = max(0, possible - turn.cached_tokens)
        missed["elsewhere" if home != turn.home else "part" if turn.cached_tokens else "gone"] += lost
        before.append(turn)
    total = sum(turn.prompt_tokens for turn in served)
    return {reason: round(missed[reason] / total, 4) for reason in REASONS}


def _best(session: Session, turn: ServedTurn, before: Sequence[ServedTurn]) -> tuple[int, int | None]:
    """(tokens, home) of the earlier turn with the longest common beginning, the last of equals."""
    blocks = session.turns[turn.index].blocks
    matches = [(common_blocks(session.turns[each.index].blocks, blocks) * PAGE_TOKENS, each.index, each.home) for each in before]
    tokens, _, home = max(matches, key=lambda match: match[:2], default=(0, 0, turn.home))
    return tokens, home
