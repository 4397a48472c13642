"""Our split of captured decode rows: bounds that hold for any lengths, what the planner is handed, and what is left alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_dcp.dataflow.attention import split_budget
from sglang_dcp.dataflow.attention.split_budget import replan, shares, with_split_budget

MULTIPROCESSORS = 132
PAGE_COUNTS = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 16_000)), min_size=1, max_size=300)


def chunks(counts: np.ndarray, pages: int) -> np.ndarray:
    """As FlashInfer counts them: an empty row has one."""
    return -(-np.maximum(counts, 1) // pages)


def arguments(counts: list[int], *, heads: int = 32, kv_heads: int = 4, page_size: int = 64, is_graph: bool = True) -> list[Any]:
    """What BatchDecodeWithPagedKVCacheWrapper.plan hands to an fa2 module."""
    indptr = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    workspaces = [torch.empty(0)] * 3
    rows = len(counts)
    sizes = [rows, rows, heads, kv_heads, page_size, is_graph, 128, 128, False, -1]
    return [*workspaces, torch.arange(rows + 1), indptr, torch.zeros(rows), *sizes, -1, False, 0, 0]


def capacity(changed: list[Any]) -> int:
    """Chunks that the captured grid holds, by FlashInfer's formula."""
    return (2 * MULTIPROCESSORS - changed[split_budget.COLOCATED_BLOCKS]) // changed[split_budget.KV_HEADS]


@given(PAGE_COUNTS, st.sampled_from((1, 2, 4, 8)), st.sampled_from((16, 64)))
def test_chunks_fit_the_captured_grid_and_none_is_longer_than_an_even_share(counts: list[int], kv_heads: int, page_size: int) -> None:
    changed = replan(arguments(counts, kv_heads=kv_heads, page_size=page_size), MULTIPROCESSORS)
    rows, total, num_shares = len(counts), sum(counts), shares(MULTIPROCESSORS, kv_heads)
    assert capacity(changed) == rows + num_shares
    pages, told = changed[split_budget.FIXED_SPLIT], np.diff(changed[split_budget.PAGE_INDPTR].numpy())
    assert pages == max(1, 128 // page_size, -(-total // num_shares))
    assert chunks(told, pages).sum() <= rows + num_shares, "FlashInfer refuses more"
    assert chunks(told, pages).max() > 1, "a plan without a split has no merge, which the captured launch has"
    beyond = chunks(told, pages) - chunks(np.array(counts), pages)
    assert not beyond[1:].any() and beyond[0] in (0, 1), "no row is given up, and at most one chunk is empty"


def test_a_long_row_is_split_beside_any_number_of_others() -> None:
    long = 4688  # 300,000 tokens
    alone = replan(arguments([long]), MULTIPROCESSORS)[split_budget.FIXED_SPLIT]
    beside = replan(arguments([16] * 128 + [0] * 64 + [long]), MULTIPROCESSORS)[split_budget.FIXED_SPLIT]
    assert -(-long // alone) >= 60 and -(-long // beside) >= 40
    assert replan(arguments([16] * 128 + [long]), MULTIPROCESSORS)[split_budget.FIXED_SPLIT] == beside, "padding rows cost no chunk"


def test_the_grid_follows_from_the_captured_size_alone() -> None:
    ones = replan(arguments([1] * 48), MULTIPROCESSORS)
    others = [replan(arguments(counts), MULTIPROCESSORS) for counts in ([1] * 47 + [9000], [0] * 48)]
    assert {capacity(other) for other in others} == {capacity(ones)}


@pytest.mark.parametrize(
    "change",
    [
        {split_budget.IS_GRAPH: False},
        {split_budget.FIXED_SPLIT: 7},
        {split_budget.DISABLE_SPLIT: True},
        {split_budget.UNIFORM_QUERIES: 2},
        {split_budget.QUERY_HEADS: 4 * 65},
    ],
)
def test_what_asks_for_something_else_is_left_alone(change: dict[int, Any]) -> None:
    given_arguments = arguments([1, 9000])
    for place, value in change.items():
        given_arguments[place] = value
    assert replan(given_arguments, MULTIPROCESSORS) == given_arguments


def test_another_planner_is_left_alone() -> None:
    fifteen = list(range(15))
    assert replan(fifteen, MULTIPROCESSORS) == fifteen


def test_a_wrapper_plans_through_it_and_runs_the_module_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=MULTIPROCESSORS))
    planned: list[Any] = []
    module = SimpleNamespace(plan=lambda *call: planned.append(call), paged_run="the module's own")

    class Wrapper:
        device = "cuda:0"

        def plan(self) -> None:
            self._cached_module = module
            self._cached_module.plan(*arguments([16] * 100 + [4688]))

    wrapper = with_split_budget(Wrapper)()
    assert getattr(wrapper, "_cached_module", None) is None
    wrapper.plan()
    assert planned[0][split_budget.FIXED_SPLIT] > 0 > planned[0][split_budget.COLOCATED_BLOCKS]
    assert wrapper._cached_module.paged_run == "the module's own"
    wrapper._cached_module = wrapper._cached_module
    wrapper._cached_module.plan(*arguments([1, 2]))
    assert len(planned) == 2


@pytest.mark.parametrize("own", [True, False])
def test_a_plan_again_is_the_planner_s_call_alone(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=MULTIPROCESSORS))
    planned: list[Any] = []

    def plan(*call: Any) -> int:
        planned.append(call)
        return len(planned)

    class Wrapper:
        device = "cuda:0"

        def plan(self, call: list[Any]) -> None:
            self._cached_module = SimpleNamespace(plan=plan)
            self._plan_info = self._cached_module.plan(*call)

    wrapper = with_split_budget(Wrapper, own=own)()
    first, later = arguments([1, 1, 0]), arguments([3, 9000, 2])
    lengths = torch.tensor([192, 575_990, 65], dtype=torch.int32)
    rows = later[split_budget.PAGE_INDPTR], lengths
    assert not wrapper.plan_again(*rows), "nothing was planned yet"
    wrapper.plan(first)
    assert wrapper.plan_again(*rows) and wrapper._plan_info == 2
    wanted = replan(later, MULTIPROCESSORS) if own else later
    assert planned[1][split_budget.PAGE_INDPTR].equal(wanted[split_budget.PAGE_INDPTR]) and planned[1][split_budget.LENGTHS] is lengths
    others = [
        place for place in range(split_budget.NUM_ARGUMENTS) if place not in (0, 1, 2, 3, split_budget.PAGE_INDPTR, split_budget.LENGTHS)
    ]
    assert [planned[1][place] for place in others] == [wanted[place] for place in others]
    assert all(planned[1][place] is first[place] for place in range(4)), "workspaces and the queries' offsets"
    assert not wrapper.plan_again(*arguments([1, 2])[split_budget.PAGE_INDPTR : split_budget.NUM_ROWS - 1]), "another number of rows"
    wrapper.plan(list(range(15)))
    assert not wrapper.plan_again(*rows), "another planner"
    assert len(planned) == 3


def test_flashinfer_still_takes_these_arguments_in_this_order() -> None:
    """The places are FlashInfer's: its source says them where it can be read."""
    import inspect

    import flashinfer.decode as decode

    source = inspect.getsource(decode)
    for caller in ("def _plan_impl", "def fast_decode_plan"):
        text = source[source.index(caller) :]
        text = text[text.index("args = [") :]
        listed = [line.split("#")[0].strip().rstrip(",") for line in text[: text.index("]")].splitlines()[1:] if line.strip()]
        assert listed[split_budget.LENGTHS] == "kv_lens_arr_host"
        assert listed[split_budget.PAGE_INDPTR] == "indptr_host" and listed[split_budget.NUM_ROWS] == "batch_size"
        assert listed[split_budget.QUERY_HEADS : split_budget.IS_GRAPH + 1] == [
            "num_qo_heads",
            "num_kv_heads",
            "page_size",
            "self.is_cuda_graph_enabled",
        ]
        assert len(listed) == split_budget.FIXED_SPLIT
        tail = text[text.index("]") : text.index("_cached_module.plan")]
        places = [tail.index(name) for name in ("fixed_split_size)", "disable_split_kv)", "num_colocated_ctas", "uniform_q_len")]
        assert places == sorted(places)
