"""A prompt that leaves one page of a pool is admitted there, by SGLang's own check: policies place it so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import schedule_policy
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

from sglang_dcp.config import DynCpConfig
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.policy.dual_balance import DualBalance
from sglang_dcp.policy.split_limits import SplitRule
from sglang_dcp.policy.types import InstanceLoad, PlacementRequest
from sglang_dcp.upstream.pool.kv_pool import LedgerAllocator
from sglang_dcp.upstream.router.placement_request import cost_model_of
from sglang_dcp.upstream.step import admission, attached
from sglang_dcp.upstream.step.runtime import Runtime, cluster_of

PAGE, PAGES = 16, 20
TREE: Any = SimpleNamespace(
    supports_mamba=lambda: False,
    evictable_size=lambda: 0,
    lock=lambda _node: None,
    unlock=lambda _lock: None,
    disable=False,
    buffer_pipeline=None,
)


def adder_of(pool: LedgerAllocator) -> Any:
    adder: Any = PrefillAdder.__new__(PrefillAdder)
    adder.page_size = adder.per_req_token_overhead = PAGE
    adder.tree_cache, adder.token_to_kv_pool_allocator = TREE, pool
    adder.memory_budget = pool.create_prefill_budget(TREE)
    adder.prefill_max_requests = adder.prefill_delayer_single_pass = adder.kv_shard_scratch_spec = None
    adder.dllm_config = adder.rem_chunk_tokens = adder.new_chunked_req = None
    adder._mamba_slot_cost, adder.exact_chunk_fill, adder.can_run_list = 0, False, []
    adder.running_batch = adder.rem_mamba_slots = None
    adder._commit_prefill_admission = lambda req, *_: adder.can_run_list.append(req)
    adder.budget_state = lambda: AddReqResult.CONTINUE
    return adder


def make_request(prompt: int) -> Any:
    params = SimpleNamespace(max_new_tokens=4, ignore_eos=False)
    hits = {"prefix_len": 0, "host_hit_length": 0, "swa_host_hit_length": 0, "auxiliary_swa_host_hit_length": 0}
    none = {"last_node": None, "dyncp": None, "dyncp_placement": None}
    ids = {"origin_input_ids": [1] * prompt, "full_untruncated_fill_ids": [1] * prompt, "output_ids": []}
    flags = {"retracted_stain": False, "needs_host_load_back": lambda: False}
    return SimpleNamespace(sampling_params=params, kv=SimpleNamespace(req_pool_idx=None), **hits, **none, **ids, **flags)


@pytest.mark.parametrize("settings", [{}, {"max_degree": 1}, {"policy": "local"}], ids=str)
@pytest.mark.parametrize("short_of", [0, 1, PAGE, PAGE + 1])
def test_a_prompt_that_leaves_a_page_starts_on_an_empty_pool(monkeypatch: pytest.MonkeyPatch, settings: Any, short_of: int) -> None:
    """One token more than it needs was asked for: at the very end of a page it waited for ever, and all local ones behind it."""
    config = DynCpConfig(**settings).resolve(2)
    pool = LedgerAllocator(PAGES * PAGE, PAGE, torch.bfloat16, "cpu", None, False)
    participant = Participant(cluster_of(config, 2, PAGES, PAGE), 0, pool)
    pool.bind(participant, TREE)
    scheduler = SimpleNamespace(waiting_queue=[], running_batch=SimpleNamespace(reqs=[]))
    monkeypatch.setattr(attached, "_runtime", Runtime(scheduler, config, participant, pool, None, None))  # type: ignore[arg-type]
    off = SimpleNamespace(features=SimpleNamespace(enable_encoder_swa_bounded_replay=False))
    monkeypatch.setattr(schedule_policy, "get_exec", lambda: off)

    prompt = (PAGES - 1) * PAGE - short_of
    req = make_request(prompt)
    adder = adder_of(pool)
    admission.add_one_req(PrefillAdder.add_one_req, adder, req, False, None)
    assert adder.can_run_list == [req]
    assert pool.alloc(prompt // PAGE * PAGE) is not None and pool.num_givable_pages() >= 1


def test_the_policy_places_it_so() -> None:
    config = DynCpConfig().resolve(2)
    policy = DualBalance(cost_model_of(config, 2), SplitRule(2))
    loads = [InstanceLoad(rank=rank, node=0, kv_tokens=0, kv_capacity=PAGES * PAGE) for rank in range(2)]
    placement = policy.place(PlacementRequest((PAGES - 1) * PAGE, 4, 4, degree=1), loads, PAGE)
    assert placement.is_local
