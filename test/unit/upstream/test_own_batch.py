"""Most steps are the last one, one token on: what is looked at then, and that a change is never missed."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dcp.config import DynCpConfig
from sglang_dcp.ledger import positions
from sglang_dcp.ledger.messages import Row, RowColumns
from sglang_dcp.ledger.page_ids import Page
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.ledger.positions import route_of
from sglang_dcp.ledger.steady import SteadyRows
from sglang_dcp.upstream.step import sitting_out
from sglang_dcp.upstream.step.own_batch import GROW_AHEAD_TOKENS, OwnBatch
from sglang_dcp.upstream.step.runtime import Runtime, cluster_of
from sglang_dcp.upstream.step.sitting_out import secure_next_token

PAGE_SIZE = 16


class Pool:
    """Pages for whoever asks, or for nobody."""

    def __init__(self) -> None:
        self.empty, self.roomy = False, True
        self.claims: list[int] = []
        self.next_page = 40_000

    def num_givable_pages(self) -> int:
        return 0 if self.empty else 50

    def has_free(self, count: int) -> bool:
        return self.roomy

    def claim_decode_page(self) -> bool:
        self.claims.append(1)
        return not self.empty

    def take_pages(self, count: int) -> list[int] | None:
        self.next_page += count
        return None if self.empty else list(range(self.next_page - count, self.next_page))


CONFIG = DynCpConfig().resolve(3)


def make_participant(config: DynCpConfig = CONFIG) -> Participant:
    return Participant(cluster_of(config, 3, 50_000, PAGE_SIZE), 0, Pool())  # type: ignore[arg-type]


class Request(SimpleNamespace):
    """Compares by identity, as SGLang's do."""

    next_output_finishes_by_length = staticmethod(lambda: False)
    finished = staticmethod(lambda: False)

    __eq__ = object.__eq__
    __hash__ = object.__hash__


def request(participant: Participant, owners: list[int] | None, length: int = 0) -> Any:
    """owners: of its pages in order; None for a local request."""
    sampling_params = SimpleNamespace(max_new_tokens=1000)
    found = Request(
        rid=object(),
        dyncp=None,
        output_ids=[],
        sampling_params=sampling_params,
        kv=SimpleNamespace(kv_allocated_len=length, req_pool_idx=0),
    )
    if owners is not None:
        found.dyncp = participant.homes.open(0)
        number = 100 * found.dyncp.handle
        participant.homes.adopt(found.dyncp, [Page(owner, number + index) for index, owner in enumerate(owners)], 0)
    return found


def take(batch: OwnBatch, reqs: list[Any], lengths: list[int]) -> None:
    """As SGLang comes to it: the new token is counted, then the batch is taken in."""
    for req, length in zip(reqs, lengths, strict=True):
        req.kv.kv_allocated_len = length
    batch.take_decode(reqs, torch.tensor(lengths))


def rows_afresh(participant: Participant, reqs: list[Any], lengths: list[int]) -> RowColumns:
    batch = OwnBatch(participant)
    take(batch, reqs, lengths)
    assert not batch.steady or not reqs
    return batch.sharded_rows()


def test_a_step_on_is_steady_until_a_route_changes() -> None:
    """The second request enters its second shard with token 33, the first one's tail moves home with token 49."""
    participant = make_participant()
    reqs = [request(participant, [1, 1, 1, 0]), request(participant, [0, 0, 2]), request(participant, None)]
    batch, lengths = OwnBatch(participant), [40, 30, 12]
    steady = []
    for _ in range(12):
        take(batch, reqs, lengths)
        steady.append(batch.steady)
        assert batch.sharded_rows() == rows_afresh(participant, reqs, lengths)
        assert batch.spans == [(req, length - 1, 1) for req, length in zip(reqs, lengths, strict=True)]
        lengths = [length + 1 for length in lengths]
    assert steady == [False, True, True, False, True, True, True, True, True, False, True, True]


def test_a_route_is_the_one_of_the_pages_that_are_there_now() -> None:
    """It is kept with the page that a row ends on; pages that come later, or fill a hole, are seen."""
    participant, rng = make_participant(), random.Random(8)
    homes, ids, group = participant.homes, participant.ids, range(3)
    for number in range(40):
        req = request(participant, [rng.randrange(3) for _ in range(rng.randrange(1, 4))])
        for page in range(6):
            for length in rng.choices(range(1, PAGE_SIZE * len(req.dyncp.pages) + 1), k=5):
                assert route_of(ids, req.dyncp, length, group) == positions._find_route(ids, req.dyncp, length, group)
            homes.append(req.dyncp, Page(rng.randrange(3), 10_000 + 10 * number + page))


def test_joins_leaves_and_other_lengths_are_changes() -> None:
    participant = make_participant()
    reqs = [request(participant, [1, 0, 0]), request(participant, None)]
    batch = OwnBatch(participant)
    take(batch, reqs, [20, 5])
    for changed, lengths in ((reqs[:1], [21]), ([*reqs, request(participant, None)], [22, 7, 3]), (reqs[::-1], [6, 21]), (reqs, [23, 9])):
        take(batch, changed, lengths)
        assert not batch.steady
    batch.take_extend([(reqs[0], 0, 24)])
    assert not batch.steady and list(batch.sharded_rows()) == [
        Row(reqs[0].dyncp.handle, 0, 24, route_of(participant.ids, reqs[0].dyncp, 24, participant.group))
    ]
    take(batch, reqs, [25, 11])
    assert not batch.steady
    batch.take(None)
    assert not batch.steady and batch.spans == []
    batch.take(None)
    assert batch.steady


def test_a_request_that_the_ledger_took_over_is_a_change() -> None:
    participant = make_participant()
    req = request(participant, None)
    batch = OwnBatch(participant)
    take(batch, [req], [16])
    req.dyncp = request(participant, [0, 1]).dyncp
    batch.note_taken_over()
    take(batch, [req], [17])
    assert not batch.steady and len(batch.sharded_rows()) == 1


@pytest.mark.parametrize("max_degree", [3, 2])
@pytest.mark.parametrize(("empty", "roomy"), [(False, False), (False, True), (True, False)])
def test_requests_passed_over_had_nothing_to_secure(max_degree: int, empty: bool, roomy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`find_leavers` against asking every request: same answers, same growth, same asks; and claims, which a roomy pool can do without."""
    rng, outcomes, config = random.Random(3), [], DynCpConfig(max_degree=max_degree).resolve(3)
    asked: list[Any] = []
    monkeypatch.setattr(sitting_out, "secure_next_token", lambda *args: asked.append(args) or secure_next_token(*args))
    kinds = [rng.choice(["local", "home", "away", "more"]) for _ in range(200)]
    lengths = [rng.randrange(1, 6 * PAGE_SIZE) for _ in kinds]
    for ask_all in (True, False):
        participant = make_participant(config)
        pool: Any = participant.pool
        pool.empty, pool.roomy = empty, roomy
        scheduler = SimpleNamespace(chunked_req=None, _reqs_finishing_inflight=lambda batch: [])
        runtime = Runtime(scheduler, config, participant, pool, None, None)  # type: ignore[arg-type]
        runtime.givable_pages = pool.num_givable_pages()
        reqs = []
        for kind, length in zip(kinds, lengths, strict=True):
            pages = -(-length // PAGE_SIZE) + (kind == "more")
            if kind == "local" and empty and length % PAGE_SIZE == 0:
                length += 1  # would be taken over, which reads SGLang's pools
            owners = None if kind == "local" else [1] * (pages - 1) + [2 if kind == "away" else 0]
            reqs.append(request(participant, owners, length))
        if ask_all:
            refused = [i for i, req in enumerate(reqs) if not secure_next_token(runtime, req)]
        else:
            known = torch.tensor([req.kv.kv_allocated_len for req in reqs])
            refused = sorted(sitting_out.find_leavers(runtime, SimpleNamespace(reqs=reqs, seq_lens_cpu=known)))
            assert 0 < len(asked) < len(reqs) * (GROW_AHEAD_TOKENS + 3) / PAGE_SIZE
        sizes = [len(req.dyncp.pages) for req in reqs if req.dyncp is not None]
        outcomes.append((refused, sizes, [str(message) for message in participant.outbox], 0 if roomy else len(pool.claims)))
    assert outcomes[0] == outcomes[1]
    assert bool(outcomes[0][0]) == (empty or max_degree == 2)


@pytest.mark.parametrize("empty", [False, True])
def test_who_has_ended_needs_nothing(empty: bool) -> None:
    """SGLang takes ended requests out of the batch behind this, and allocates nothing if none is left: a page claimed for one stayed
    claimed, and the step's grants found the pool short of it."""
    participant = make_participant()
    pool: Any = participant.pool
    pool.empty, pool.roomy = empty, False
    scheduler = SimpleNamespace(chunked_req=None, _reqs_finishing_inflight=lambda batch: [])
    runtime = Runtime(scheduler, CONFIG, participant, pool, None, None)  # type: ignore[arg-type]
    reqs = [request(participant, None), request(participant, [0, 1])]
    for req in reqs:
        req.finished = lambda: True
    batch = SimpleNamespace(reqs=reqs, seq_lens_cpu=torch.tensor([2 * PAGE_SIZE, 2 * PAGE_SIZE]))
    assert sitting_out.find_leavers(runtime, batch) == set()
    assert not pool.claims and not participant.outbox and reqs[0].dyncp is None and len(reqs[1].dyncp.pages) == 2


def test_the_next_batch_is_looked_up_where_it_is_known() -> None:
    """Same answers as from its lengths, which are not read for the requests taken in last."""
    participant, rng = make_participant(), random.Random(5)
    reqs, batch = [request(participant, None) for _ in range(50)], OwnBatch(participant)
    lengths = [rng.randrange(1, 70) for _ in reqs]
    unread: Any = None
    for step in range(40):
        known = step % 10 > 0
        if not known:
            rng.shuffle(reqs)
            lengths = [req.kv.kv_allocated_len or length for req, length in zip(reqs, lengths, strict=True)]
        for home_is_full in (False, True):
            found = batch.to_secure(reqs, unread if known else torch.tensor(lengths), home_is_full=home_is_full)
            ahead = GROW_AHEAD_TOKENS if home_is_full else 0
            assert list(found) == [i for i, length in enumerate(lengths) if -length % PAGE_SIZE <= ahead]
        lengths = [length + 1 for length in lengths]
        found = batch.beginning_page(reqs, unread if known else torch.tensor(lengths))
        assert list(found) == [i for i, length in enumerate(lengths) if length % PAGE_SIZE == 1]
        take(batch, reqs, lengths)
        assert batch.steady == known


def test_a_quiet_step_is_one_in_which_no_request_of_the_ledger_begins_a_page() -> None:
    """Asked ahead of the step, over three pages; a request that is taken over counts from then on, and other batches are not quiet."""
    participant, rng = make_participant(), random.Random(6)
    reqs = [request(participant, [0] * 9 if i % 10 == 0 else None) for i in range(30)]
    batch, lengths = OwnBatch(participant), [rng.randrange(1, 5 * PAGE_SIZE) for _ in reqs]
    assert not batch.is_quiet(reqs)
    for step in range(3 * PAGE_SIZE):
        take(batch, reqs, lengths)
        if step == PAGE_SIZE:
            reqs[1].dyncp = request(participant, [0] * 9).dyncp
            batch.note_taken_over()
        begins = any(req.dyncp is not None and length % PAGE_SIZE == 0 for req, length in zip(reqs, lengths, strict=True))
        assert batch.is_quiet(reqs) == (not begins)
        assert not batch.is_quiet(reqs[:-1]) and not batch.is_quiet([])
        lengths = [length + 1 for length in lengths]
    batch.take_extend([(reqs[0], 0, 24)])
    assert not batch.is_quiet(reqs[:1])


def test_one_request_tells_that_lengths_went_apart() -> None:
    """A batch of the same requests that is not one token on is read anew."""
    participant = make_participant()
    reqs, batch = [request(participant, None), request(participant, None)], OwnBatch(participant)
    take(batch, reqs, [15, 7])
    take(batch, reqs, [18, 10])
    assert not batch.steady and [prefix_len for _, prefix_len, _ in batch.spans] == [17, 9]
    assert list(batch.to_secure(reqs, torch.tensor([18, 10]), home_is_full=False)) == []
    reqs[-1].kv.kv_allocated_len = 32
    assert list(batch.to_secure(reqs, torch.tensor([18, 32]), home_is_full=False)) == [1]


@pytest.mark.parametrize("page_size", [1, 2, 5])
def test_phases_of_small_pages(page_size: int) -> None:
    lengths = [1, 2, 5, 9, 10]
    rows, some = SteadyRows("abcde", lengths, page_size), SteadyRows((), lengths, page_size, growing=[0, 1, 0, 1, 0])
    for age in range(12):
        now = [length + age for length in lengths]
        begin = [i for i, length in enumerate(now) if length % page_size == 1 % page_size]
        assert list(rows.beginning()) == begin and list(some.beginning()) == [i for i in begin if i in (1, 3)]
        assert [rows.tokens(index) for index in range(5)] == now
        for tokens in (0, 1, 8):
            assert list(rows.near_end(tokens)) == [i for i, length in enumerate(now) if -length % page_size <= tokens]
        assert rows.are("abcde", now[-1], 0) and rows.are("abcde", now[-1] + 1, 1)
        assert not rows.are("abcde", now[-1] + 1, 0) and not rows.are("abced", now[-1], 0)
        for ahead in (1, page_size):
            later = [i for i, length in enumerate(now) if (length + ahead) % page_size == 1 % page_size]
            assert list(rows.beginning(ahead)) == later
        rows.age += 1
        some.age += 1
