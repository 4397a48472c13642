"""Schedules for FlashAttention 3, whose device code runs in Triton's interpreter here, beside the same in plain Python."""

from __future__ import annotations

import random
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sglang_dcp.dataflow.attention.flash_splits import MOST_SCHEDULED
from testing.kernels.flash_schedule import CUTS, SMALL, Sizes, interpreted, parts_of_cut, parts_of_rows, price, read_schedule

H200 = Sizes(kv_heads=4, multiprocessors=132, most_parts=33)


def some_lengths(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.choice([0, 1, 128, 129, rng.randrange(1, 9000), 30_000]) for _ in range(rng.randrange(1, 14))]


ROWS = {f"seed {seed}": some_lengths(seed) for seed in range(5)}
ROWS |= {"padding alone": [0] * 5, "one key": [1], "longer than a context": [5_000_000, 0]}
CASES = [(name, False) for name in ROWS] + [("seed 0", True), ("padding alone", True)]


@pytest.fixture(scope="module")
def planned() -> dict[tuple[str, bool], list[int]]:
    pytest.importorskip("triton")
    return dict(zip(CASES, interpreted([(ROWS[name], causal) for name, causal in CASES]), strict=True))


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_what_the_device_plans_is_what_plain_python_does(planned: dict[tuple[str, bool], list[int]], name: str, causal: bool) -> None:
    lengths = ROWS[name]
    parts, order = read_schedule(planned[name, causal], len(lengths), SMALL.kv_heads, causal=causal)
    expected = parts_of_rows(lengths, SMALL)
    assert parts == [count for count, _ in expected] and max(parts) <= SMALL.most_parts
    costs = [expected[row][1] for row in order]
    assert costs == sorted(costs, reverse=True), "the longest parts are handed out first"


def test_rows_of_a_shape_that_the_library_s_rule_leaves_a_third_idle_for() -> None:
    halves = [35_000] * 22
    chosen = parts_of_rows(halves, H200)
    assert {count for count, _ in chosen} == {3}, "264 parts for 132 multiprocessors"
    assert price(chosen, H200) < 0.7 * price(parts_of_cut(halves, 0, H200), H200)


@pytest.mark.parametrize("seed", range(20))
def test_never_dearer_than_the_widest_cut_and_near_the_best(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [int(min(400_000, rng.lognormvariate(rng.uniform(6, 11), rng.uniform(0, 1.2)))) for _ in range(rng.randrange(1, 120))]
    cuts = [parts_of_cut(lengths, cut, H200) for cut in range(CUTS)]
    exact = [price(parts, H200, finest=10**9) for parts in cuts]
    chosen = price(parts_of_rows(lengths, H200), H200, finest=10**9)
    assert chosen <= 1.1 * min(exact) and chosen <= 1.02 * exact[0]


@pytest.fixture
def flash_schedule() -> ModuleType:
    return pytest.importorskip("sglang_dcp.dataflow.attention.flash_schedule")


def test_sizes_that_do_not_fit(flash_schedule: ModuleType) -> None:
    with pytest.raises(ValueError, match="at most 992 rows, got 993"):
        flash_schedule.FlashSchedule(MOST_SCHEDULED + 1, 4, 33, "cpu", multiprocessors=132)
    with pytest.raises(ValueError, match="this GPU has 257"):
        flash_schedule.FlashSchedule(8, 4, 33, "cpu", multiprocessors=257)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """get_scheduler_metadata of a library that gives `made`."""
    fake = SimpleNamespace(made=[1] * 5 + [0] * 3 + [1] * 5 + [0] * 3 + [4, 3, 2, 1, 0] + [0] * 3 + [0], asked={})
    module = ModuleType("sgl_kernel.flash_attn")

    def get_scheduler_metadata(**asked: object) -> torch.Tensor:
        fake.asked = asked
        return torch.tensor(fake.made, dtype=torch.int32)

    module.__dict__["get_scheduler_metadata"] = get_scheduler_metadata
    monkeypatch.setitem(sys.modules, "sgl_kernel", ModuleType("sgl_kernel"))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", module)
    return fake


def check(module: ModuleType, *, causal: bool = False) -> None:
    module.check_layout(32, 4, 64, torch.bfloat16, 64, causal, "cpu")


def test_a_library_with_the_known_layout_is_taken(flash_schedule: ModuleType, library: SimpleNamespace) -> None:
    check(flash_schedule)
    assert library.asked["causal"] and library.asked["num_heads_k"] == 4 and library.asked["page_size"] == 64
    library.made[-1:] = [4] * 5 + [0] * 4
    check(flash_schedule, causal=True)


@pytest.mark.parametrize("change", [{-1: 3}, {0: 2}, {8: 0}, {16: 9}], ids=["counter", "parts", "tiles", "rows"])
def test_another_layout_is_refused_by_name(flash_schedule: ModuleType, library: SimpleNamespace, change: dict[int, int]) -> None:
    for place, value in change.items():
        library.made[place] = value
    with pytest.raises(RuntimeError, match="--dyncp-split-budget stock"):
        check(flash_schedule)


def test_a_vector_more_is_refused_by_name(flash_schedule: ModuleType, library: SimpleNamespace) -> None:
    with pytest.raises(RuntimeError, match="not in 4 vectors"):
        check(flash_schedule, causal=True)


def test_a_round_of_quantised_keys_is_longer(flash_schedule: ModuleType) -> None:
    assert [flash_schedule.block_tokens(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn)] == [128, 160]
