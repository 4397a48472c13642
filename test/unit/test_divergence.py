"""An instance whose ledger has gone apart from the others' ends the server, in the step after the first decision that shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from sglang_dcp.config import DynCpConfig
from sglang_dcp.ledger.columns import DECISIONS
from sglang_dcp.ledger.messages import AskAdmission, Release
from sglang_dcp.ledger.participant import Participant, ProtocolError
from sglang_dcp.policy.growth import Order
from sglang_dcp.upstream.step.runtime import cluster_of
from testing.protocol.fakes import FakePool

NUM_INSTANCES, NUM_PAGES, PAGE_SIZE = 3, 8, 4


class Instances:
    """In lock step. Nothing runs on them: pages are asked for, granted and given back."""

    def __init__(self, slice_index: int = 0) -> None:
        cluster = cluster_of(DynCpConfig().resolve(NUM_INSTANCES), NUM_INSTANCES, NUM_PAGES, PAGE_SIZE)
        self.all = [Participant(cluster, rank, FakePool(NUM_PAGES), slice_index) for rank in range(NUM_INSTANCES)]

    def ask(self, home: int, *pages: int):
        """A request of so many pages of each instance, its home last."""
        instance = self.all[home]
        request = instance.open_request()
        order = [*(rank for rank in range(NUM_INSTANCES) if rank != home), home]
        instance.ask_admission(request, [(rank, pages[rank]) for rank in order if pages[rank]], flexible=False)
        return request

    def columns(self) -> list[list[int]]:
        return [instance.build_columns(None, instance.pool.num_givable_pages(), 0, 0) for instance in self.all]

    def step(self) -> None:
        self.settle(self.columns())

    def settle(self, columns: list[list[int]]) -> None:
        words = [instance.own_words for instance in self.all]
        for instance in self.all:
            instance.read_columns(columns)
        for instance in self.all:
            instance.finish_step(words, anybody_runs=True)


@pytest.fixture
def instances() -> Instances:
    """The first request holds most pages, the second waits for them, and a third one waits behind it."""
    found = Instances()
    found.first = found.ask(0, 6, 6, 0)  # type: ignore[attr-defined]
    found.step()
    for home, pages in ((1, (0, 7, 7)), (2, (0, 4, 3))):
        found.ask(home, *pages)
    for _ in range(3):
        found.step()
    assert [len(instance.table) for instance in found.all] == [2] * NUM_INSTANCES
    return found


def finish(instances: Instances) -> None:
    """The first request ends, the others get their turn."""
    instances.all[0].release(instances.first)  # type: ignore[attr-defined]
    for _ in range(4):
        instances.step()


def test_instances_that_agree_go_on(instances: Instances) -> None:
    seen = {row[DECISIONS] for row in instances.columns()}
    assert len(seen) == 1 and seen != {0}
    finish(instances)
    assert [len(instance.table) for instance in instances.all] == [1] * NUM_INSTANCES


def waiting(instance: Participant) -> list[tuple[Order, AskAdmission]]:
    return list(instance.table._admissions.in_turn())


def lose(instance: Participant) -> None:
    (_, home, handle), _ = waiting(instance)[0]
    instance.table.withdraw(home, handle)


def reorder(instance: Participant) -> None:
    (_, home, _), ask = waiting(instance)[0]
    instance.table.ask(home, dataclasses.replace(ask, born=ask.born + 100))


def move(instance: Participant) -> None:
    (_, home, _), ask = waiting(instance)[-1]
    (rank, pages), (other, more) = ask.segments
    instance.table.ask(home, dataclasses.replace(ask, segments=((rank, pages + 1), (other, more - 1))))


def invent(instance: Participant) -> None:
    instance.table.ask(0, AskAdmission(99, 50, False, ((0, 1),)))


def forget_limits(instance: Participant) -> None:
    """A setting that only one instance has, and that shows when guests are many."""
    instance.limits = dataclasses.replace(instance.limits, guest_pages=NUM_PAGES // 2)


@pytest.mark.parametrize("rank", range(NUM_INSTANCES))
@pytest.mark.parametrize("corrupt", [lose, reorder, move, invent, forget_limits])
def test_a_ledger_that_went_apart_ends_the_server(instances: Instances, corrupt: Callable[[Participant], None], rank: int) -> None:
    corrupt(instances.all[rank])
    others = [other for other in range(NUM_INSTANCES) if other != rank]
    told = rf"rank 0, step \d+: instances \{[rank] if rank else others}"
    with pytest.raises(ProtocolError, match=told.replace("]", r"\]") + " decided otherwise"):
        finish(instances)


def test_every_instance_names_the_others(instances: Instances) -> None:
    lose(instances.all[1])
    instances.step()
    columns = instances.columns()
    for instance, told in zip(instances.all, ([1], [0, 2], [1]), strict=True):
        with pytest.raises(ProtocolError, match=str(told).replace("[", r"\[").replace("]", r"\]")):
            instance.read_columns(columns)


def run_slices(corrupt: Callable[[Participant], None] | None = None, rank: int = 0) -> None:
    """Two slices of every instance, while requests get pages, wait and end; the second slice of instance `rank` is corrupted between."""
    first, second = Instances(), Instances(slice_index=1)
    began = [slices.ask(0, 6, 6, 0) for slices in (first, second)]
    for step in range(8):
        if step in (1, 2):
            for slices in (first, second):
                slices.ask(step, *((0, 7, 7) if step == 1 else (0, 4, 3)))
        if step == 4 and corrupt is not None:
            corrupt(second.all[rank])
        if step == 5:
            for slices, request in zip((first, second), began, strict=True):
                slices.all[0].release(request)
        told, _ = first.columns(), second.columns()
        second.settle(told)
        first.settle(told)


def test_slices_that_agree_go_on() -> None:
    run_slices()


def lose_a_page(instance: Participant) -> None:
    instance.pool.take_pages(1)


def skip_a_step(instance: Participant) -> None:
    instance.step += 1


def tell_more(instance: Participant) -> None:
    instance.outbox.append(Release(77))


def decide_otherwise(instance: Participant) -> None:
    instance.decisions.value += 1


@pytest.mark.parametrize("rank", range(NUM_INSTANCES))
@pytest.mark.parametrize(
    ("corrupt", "told"),
    [
        (lose_a_page, r"free pages \d, not \d"),
        (skip_a_step, "step 5, not 4"),
        (tell_more, r"message words \d+, not \d+"),
        (decide_otherwise, r"decisions about pages \d+, not \d+"),
    ],
)
def test_a_slice_that_went_apart_ends_the_server(corrupt: Callable[[Participant], None], told: str, rank: int) -> None:
    """Before any exchange that would wait for it: whoever went apart says so, with what differed."""
    with pytest.raises(ProtocolError, match=rf"instance {rank}, slice 1, step [45]: went apart from slice 0 in {told}$"):
        run_slices(corrupt, rank)
