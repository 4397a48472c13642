"""Most steps are the last one, one token on: what is looked at then, and that a change is never missed."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_dcp.config import DynCpConfig
from sglang_dcp.ledger.messages import Row
from sglang_dcp.ledger.page_ids import Page
from sglang_dcp.upstream.binding import Binding
from sglang_dcp.upstream.decode import GROW_AHEAD_TOKENS, near_page_end, secure_next_token
from sglang_dcp.upstream.instance import Instance
from sglang_dcp.upstream.own_batch import OwnBatch

PAGE_SIZE = 16


class Pool:
    """Pages for whoever asks, or for nobody."""

    def __init__(self) -> None:
        self.empty = False
        self.claims: list[int] = []
        self.next_page = 40_000

    def num_givable_pages(self) -> int:
        return 0 if self.empty else 50

    def claim_decode_page(self) -> bool:
        self.claims.append(1)
        return not self.empty

    def take_pages(self, count: int) -> list[int] | None:
        self.next_page += count
        return None if self.empty else list(range(self.next_page - count, self.next_page))


def make_instance() -> Instance:
    return Instance(DynCpConfig().resolve(3), 0, 3, 50_000, PAGE_SIZE, Pool())  # type: ignore[arg-type]


def request(instance: Instance, owners: list[int] | None, length: int = 0) -> Any:
    """owners: of its pages in order; None for a local request."""
    found = SimpleNamespace(rid=object(), dyncp=None, kv=SimpleNamespace(kv_allocated_len=length))
    if owners is not None:
        found.dyncp = instance.homes.open(0)
        number = 100 * found.dyncp.handle
        instance.homes.adopt(found.dyncp, [Page(owner, number + index) for index, owner in enumerate(owners)], 0)
    return found


def rows_afresh(instance: Instance, reqs: list[Any], lengths: np.ndarray) -> list[Row]:
    batch = OwnBatch(instance)
    batch.take_decode(reqs, lengths)
    assert not batch.steady or not reqs
    return batch.sharded_rows()


def test_a_step_on_is_steady_until_a_route_changes() -> None:
    """The second request enters its second shard with token 33, the first one's tail moves home with token 49."""
    instance = make_instance()
    reqs = [request(instance, [1, 1, 1, 0]), request(instance, [0, 0, 2]), request(instance, None)]
    batch, lengths = OwnBatch(instance), np.array([40, 30, 12])
    steady = []
    for _ in range(12):
        batch.take_decode(reqs, lengths)
        steady.append(batch.steady)
        assert batch.sharded_rows() == rows_afresh(instance, reqs, lengths)
        assert batch.spans == [(req, length - 1, 1) for req, length in zip(reqs, lengths.tolist(), strict=True)]
        lengths = lengths + 1
    assert steady == [False, True, True, False, True, True, True, True, True, False, True, True]


def test_joins_leaves_and_other_lengths_are_changes() -> None:
    instance = make_instance()
    reqs = [request(instance, [1, 0, 0]), request(instance, None)]
    batch = OwnBatch(instance)
    batch.take_decode(reqs, np.array([20, 5]))
    for changed, lengths in ((reqs[:1], [21]), ([*reqs, request(instance, None)], [22, 7, 3]), (reqs[::-1], [6, 21]), (reqs, [23, 9])):
        batch.take_decode(changed, np.array(lengths))
        assert not batch.steady
    batch.take_extend([(reqs[0], 0, 24)])
    assert not batch.steady and batch.sharded_rows() == [Row(reqs[0].dyncp.handle, 0, 24, instance.route_of(reqs[0].dyncp, 24))]
    batch.take_decode(reqs, np.array([25, 11]))
    assert not batch.steady
    batch.take(None)
    assert not batch.steady and batch.spans == []
    batch.take(None)
    assert batch.steady


def test_a_request_that_the_ledger_took_over_is_a_change() -> None:
    instance = make_instance()
    req = request(instance, None)
    batch = OwnBatch(instance)
    batch.take_decode([req], np.array([16]))
    req.dyncp = request(instance, [0, 1]).dyncp
    batch.take_decode([req], np.array([17]))
    assert not batch.steady and len(batch.sharded_rows()) == 1


@pytest.mark.parametrize("empty", [False, True])
def test_requests_passed_over_had_nothing_to_secure(empty: bool) -> None:
    """`near_page_end` against asking every request: same answers, same growth, same asks."""
    rng, outcomes = random.Random(3), []
    kinds = [rng.choice(["local", "home", "away", "more"]) for _ in range(200)]
    lengths = [rng.randrange(1, 6 * PAGE_SIZE) for _ in kinds]
    for ask_all in (True, False):
        instance = make_instance()
        instance.pool.empty = empty  # type: ignore[attr-defined]
        binding = Binding(None, instance, None, None)  # type: ignore[arg-type]
        reqs = []
        for kind, length in zip(kinds, lengths, strict=True):
            pages = -(-length // PAGE_SIZE) + (kind == "more")
            if kind == "local" and empty and length % PAGE_SIZE == 0:
                length += 1  # would be taken over, which reads SGLang's pools
            owners = None if kind == "local" else [1] * (pages - 1) + [2 if kind == "away" else 0]
            reqs.append(request(instance, owners, length))
        asked = range(len(reqs)) if ask_all else near_page_end(np.array([req.kv.kv_allocated_len for req in reqs]), PAGE_SIZE)
        refused = [i for i in asked if not secure_next_token(binding, reqs[i])]
        sizes = [len(req.dyncp.pages) for req in reqs if req.dyncp is not None]
        outcomes.append((refused, sizes, [str(message) for message in instance.outbox], len(instance.pool.claims)))  # type: ignore[attr-defined]
        assert ask_all or len(asked) < len(reqs) * (GROW_AHEAD_TOKENS + 3) / PAGE_SIZE
    assert outcomes[0] == outcomes[1]
    assert bool(outcomes[0][0]) == empty
