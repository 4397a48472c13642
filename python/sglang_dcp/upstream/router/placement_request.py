"""What a policy is told about a request: the same in the main process, which refuses, and in the router, which places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_dcp.config import DynCpConfig
from sglang_dcp.policy.cost_model import CostModel
from sglang_dcp.policy.expected_output import expected_new_tokens
from sglang_dcp.policy.served_model import served_cost
from sglang_dcp.policy.types import PlacementRequest


def cost_model_of(config: DynCpConfig, num_instances: int) -> CostModel:
    """The same in every process."""
    return served_cost(config.cost_model, config.served_model, num_instances, config.split_budget).model


def describe_request(
    prompt_tokens: int,
    max_new_tokens: int | None,
    pin: Mapping[str, Any],
    reach_tokens: int,
    named_home: int | None = None,
    *,
    page_size: int,
    largest_degree: int,
) -> PlacementRequest:
    """max_new_tokens None: the client set no bound, so the output ends where `reach_tokens`, the pools of one request, end.
    largest_degree: how many these are (SplitLimits.max_degree).

    A pinned degree with `at_most` is the prompt's pages where it has fewer, so that a client can pin all its requests alike.
    named_home: the rank that the client named by SGLang's own means (routed_dp_rank, header); never beside a pin.
    """
    if max_new_tokens is None:
        max_new_tokens = expected_new_tokens(max(0, reach_tokens - prompt_tokens), largest_degree)
    degree = pin.get("degree")
    if degree is not None and pin.get("at_most"):
        degree = min(degree, max(1, -(-prompt_tokens // page_size)))
    return PlacementRequest(
        prompt_tokens=prompt_tokens,
        expected_new_tokens=expected_new_tokens(max_new_tokens, largest_degree),
        max_new_tokens=max_new_tokens,
        degree=degree,
        home=pin.get("home", named_home),
    )
