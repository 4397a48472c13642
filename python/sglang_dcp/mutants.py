"""Faults switched on from outside, one at a time, so that tests can show that they would notice. Never on in a server that serves.

SGLANG_DYNCP_MUTANT names one; it is refused unless SGLANG_DYNCP_TESTING=1. A mutant replaces functions of dataflow/ or ledger/ by broken
ones; the production path has no branch for it.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sglang_dcp.dataflow import attention_step, contracts, step_plan
from sglang_dcp.dataflow.contracts import AttentionRow, GuestRow, HomeRow, MergeList, PartialState, StepPlan
from sglang_dcp.mutants_retained import RETAINED_MUTANTS
from sglang_dcp.mutants_window import WINDOW_MUTANTS

MUTANT_VARIABLE = "SGLANG_DYNCP_MUTANT"
TESTING_VARIABLE = "SGLANG_DYNCP_TESTING"


class MutantError(RuntimeError):
    """A fault was asked for that does not exist, or outside a test."""


_installed: str | None = None


def install_mutant(environment: Mapping[str, str] = os.environ) -> str | None:
    """Installs the fault that the environment names, once per process. Returns its name, None when there is none."""
    global _installed
    name = environment.get(MUTANT_VARIABLE)
    if not name or name == _installed:
        return name or None
    if environment.get(TESTING_VARIABLE) != "1":
        raise MutantError(f"{MUTANT_VARIABLE}={name} breaks the answers on purpose; it is refused unless {TESTING_VARIABLE}=1")
    if name not in MUTANTS:
        raise MutantError(f"{MUTANT_VARIABLE}={name} is unknown; there are {', '.join(MUTANTS)}")
    if _installed is not None:
        raise MutantError(f"{MUTANT_VARIABLE}={name}: {_installed} is installed already, one at a time")
    MUTANTS[name]()
    _installed = name
    return name


def _replace(module: Any, name: str, wrap: Callable[[Any], Any], *, everywhere: bool = False) -> None:
    """Replaces module.name; with `everywhere` also the references that other loaded modules imported by name."""
    original = getattr(module, name)
    broken = wrap(original)
    setattr(module, name, broken)
    if everywhere:
        for other in list(sys.modules.values()):
            if getattr(other, "__dict__", {}).get(name) is original:
                setattr(other, name, broken)


# ---- what comes back from the shards, and the merge


def _with_returned(change: Callable[[PartialState, StepPlan], PartialState]) -> None:
    def wrap(original: Any) -> Any:
        return lambda state, plan, *args, **kwargs: change(original(state, plan, *args, **kwargs), plan)

    _replace(attention_step, "return_partials", wrap)


def _drop_last_shard(returned: PartialState, plan: StepPlan) -> PartialState:
    """Partials are ordered by shard."""
    last = next((len(tokens) for tokens in reversed(plan.send_queries) if len(tokens)), 0)
    lse = returned.lse.clone()
    lse[len(lse) - last :] = float("-inf")
    return PartialState(returned.output, lse)


def _shard_dropped() -> None:
    """The partial results of one shard are lost on the way home."""
    _with_returned(_drop_last_shard)


def _lse_base_2() -> None:
    """Shards return base-2 logarithms."""
    _with_returned(lambda returned, _: PartialState(returned.output, returned.lse / math.log(2.0)))


def _with_merge(change: Callable[[Callable[..., None], PartialState, MergeList, PartialState, PartialState], None]) -> None:
    _replace(attention_step, "merge_into", lambda original: lambda *args: change(original, *args))


def _shard_read_twice() -> None:
    """A partial result enters the merge twice."""

    def change(merge: Callable[..., None], state: PartialState, merges: MergeList, own: PartialState, returned: PartialState) -> None:
        twice = dataclasses.replace(merges, begins=2 * merges.begins, returned_rows=merges.returned_rows.repeat_interleave(2))
        merge(state, twice, own, returned)

    _with_merge(change)


def _lse_ignored() -> None:
    """Partial results are averaged instead of weighed."""

    def flat(part: PartialState) -> PartialState:
        return PartialState(part.output, torch.where(part.lse == float("-inf"), part.lse, torch.zeros_like(part.lse)))

    def change(merge: Callable[..., None], state: PartialState, merges: MergeList, own: PartialState, returned: PartialState) -> None:
        state.lse.copy_(flat(state).lse)
        merge(state, merges, flat(own), flat(returned))

    _with_merge(change)


def _neutral_zero() -> None:
    """A query that saw no key says LSE 0 instead of -inf."""

    def neutral(*shape: int, v_head_dim: int, dtype: torch.dtype, device: torch.device | str) -> PartialState:
        return PartialState(torch.zeros(*shape, v_head_dim, dtype=dtype, device=device), torch.zeros(shape, device=device))

    contracts.PartialState.neutral = staticmethod(neutral)  # type: ignore[method-assign]


# ---- the plan of a step


def _with_plan(change: Callable[[Callable[..., StepPlan], dict[str, Any]], StepPlan]) -> None:
    """change(build_step_plan, its arguments by name)."""

    def wrap(original: Any) -> Any:
        parameters = inspect.signature(original)
        return lambda *args: change(original, parameters.bind(*args).arguments)

    _replace(step_plan, "build_step_plan", wrap, everywhere=True)


def _tail_row_written_twice() -> None:
    """K/V whose tail is remote is also written at home, into whatever page has that number here."""

    def change(build: Callable[..., StepPlan], given: dict[str, Any]) -> StepPlan:
        plan, rank, page_size = build(**given), given["rank"], given["page_size"]
        slots = plan.write_slots.clone()
        for row in given["home_rows"]:
            positions = np.arange(row.prefix_len, row.prefix_len + row.num_new)
            remote = np.flatnonzero(row.page_owners[positions // page_size] != rank)
            numbers = row.page_numbers[positions[remote] // page_size]
            slots[row.token_start + remote] = torch.from_numpy(numbers * page_size + positions[remote] % page_size)
        return dataclasses.replace(plan, write_slots=slots)

    _with_plan(change)


def _tail_row_not_written() -> None:
    """K/V that arrives at a remote tail goes to the padding page."""

    def change(build: Callable[..., StepPlan], given: dict[str, Any]) -> StepPlan:
        plan = build(**given)
        return dataclasses.replace(plan, receive_kv_slots=tuple(map(torch.zeros_like, plan.receive_kv_slots)))

    _with_plan(change)


def _wrong_owner() -> None:
    """The home takes the number of another instance's page for one of its own."""

    def swap(row: HomeRow, rank: int) -> HomeRow:
        own, foreign = np.flatnonzero(row.page_owners == rank), np.flatnonzero(row.page_owners != rank)
        if not len(own) or not len(foreign):
            return row
        numbers = row.page_numbers.copy()
        numbers[own[0]] = row.page_numbers[foreign[0]]
        return dataclasses.replace(row, page_numbers=numbers)

    def change(build: Callable[..., StepPlan], given: dict[str, Any]) -> StepPlan:
        return build(**given | {"home_rows": [swap(row, given["rank"]) for row in given["home_rows"]]})

    _with_plan(change)


def _page_table_stale() -> None:
    """Row i of a step uses the page table that row i had one step ago; pages that it did not have are the padding page."""
    last: dict[int, tuple[int, Sequence[HomeRow], Sequence[GuestRow]]] = {}

    def stale_home(row: HomeRow, old: HomeRow) -> HomeRow:
        numbers = np.zeros_like(row.page_numbers)
        count = min(len(numbers), len(old.page_numbers))
        same = old.page_owners[:count] == row.page_owners[:count]
        numbers[:count][same] = old.page_numbers[:count][same]
        return dataclasses.replace(row, page_numbers=numbers)

    def stale_guest(row: GuestRow, old: GuestRow) -> GuestRow:
        known = dict(zip(old.page_index.tolist(), old.page_numbers.tolist(), strict=True))
        return dataclasses.replace(row, page_numbers=np.array([known.get(i, 0) for i in row.page_index.tolist()], dtype=np.int64))

    def change(build: Callable[..., StepPlan], given: dict[str, Any]) -> StepPlan:
        step, rank, home_rows, guests = (given[name] for name in ("step", "rank", "home_rows", "guest_rows"))
        old_step, old_home, old_guests = last.get(rank, (-1, (), ()))
        last[rank] = step, home_rows, guests
        if old_step == step - 1:
            home_rows = [stale_home(*pair) for pair in zip(home_rows, old_home, strict=False)] + list(home_rows[len(old_home) :])
            guests = [stale_guest(*pair) for pair in zip(guests, old_guests, strict=False)] + list(guests[len(old_guests) :])
        return build(**given | {"home_rows": home_rows, "guest_rows": guests})

    _with_plan(change)


def _chunk_not_causal() -> None:
    """The tokens of a chunk see the whole chunk."""

    def wrap(original: Any) -> Any:
        def chunk_row(*args: Any) -> AttentionRow:
            row: AttentionRow = original(*args)
            return dataclasses.replace(row, causal=False)

        return chunk_row

    _replace(step_plan, "chunk_row", wrap)


# ---- the ledger


def _guest_page_freed_early() -> None:
    """A shard frees a guest's pages in the first step that has no row of it, instead of when its home gives them back."""
    from sglang_dcp.ledger.participant import Participant

    def wrap(original: Any) -> Any:
        def finish_step(participant: Any, *args: Any, **kwargs: Any) -> Any:
            decision = original(participant, *args, **kwargs)
            rows = {(home, row.handle) for home, table in enumerate(participant.rows_of) for row in table}
            for key in sorted(getattr(participant, "_mutant_rows", set()) - rows):
                participant.pool.return_pages(participant.guests.take_back(*key))
            participant._mutant_rows = rows
            return decision

        return finish_step

    _replace(Participant, "finish_step", wrap)


MUTANTS: dict[str, Callable[[], None]] = {
    "shard-dropped": _shard_dropped,
    "shard-read-twice": _shard_read_twice,
    "lse-base-2": _lse_base_2,
    "lse-ignored": _lse_ignored,
    "tail-row-written-twice": _tail_row_written_twice,
    "tail-row-not-written": _tail_row_not_written,
    "page-table-stale": _page_table_stale,
    "guest-page-freed-early": _guest_page_freed_early,
    "chunk-not-causal": _chunk_not_causal,
    "neutral-zero": _neutral_zero,
    "wrong-owner": _wrong_owner,
    **RETAINED_MUTANTS,
    **WINDOW_MUTANTS,
}
"""Fault by name; each function's docstring says what goes wrong."""
