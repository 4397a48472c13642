"""Instances that were started differently refuse to serve, and say what differs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from sglang_dcp.config import DynCpConfig
from sglang_dcp.ledger.cluster import Cluster
from sglang_dcp.upstream.attach import agreement
from sglang_dcp.upstream.attach.agreement import AgreementError, check_agreement, facts_of, find_difference
from sglang_dcp.upstream.step.runtime import cluster_of

Started = tuple[DynCpConfig, Cluster]


def instance(num_pages: int = 8, page_size: int = 16, **settings: Any) -> Started:
    config = DynCpConfig(**settings).resolve(2)
    return config, cluster_of(config, 2, num_pages, page_size)


def check(*instances: Started, dtypes: tuple[Any, ...] = (torch.bfloat16, torch.bfloat16)) -> str | None:
    return find_difference([facts_of(*one, dtype) for one, dtype in zip(instances, dtypes, strict=True)], 2)


def test_instances_started_alike_agree() -> None:
    assert check(instance(), instance()) is None


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"num_pages": 7}, "the pages of a pool is 8 on instances [0], 7 on instances [1]"),
        ({"page_size": 32}, "--page-size is 16 on instances [0], 32 on instances [1]"),
        ({"max_degree": 1}, "--dyncp-max-degree is 2 on instances [0], 1 on instances [1]"),
        ({"max_guest_fraction": 0.5}, "--dyncp-max-guest-fraction is 1.0 on instances [0], 0.5 on instances [1]"),
        ({"num_nodes": 2}, "--nnodes is 1 on instances [0], 2 on instances [1]"),
        ({"max_rows": 32}, "--dyncp-max-rows is 64 on instances [0], 32 on instances [1]"),
    ],
)
def test_a_difference_is_named_with_its_instances(other: dict[str, Any], difference: str) -> None:
    assert check(instance(), instance(**other)) == difference


def test_ranks_are_named_where_an_instance_has_several_slices() -> None:
    told = [facts_of(*instance(num_pages=pages), torch.bfloat16) for pages in (8, 8, 8, 7)]
    assert find_difference(told, 2) == "the pages of a pool is 8 on ranks [0, 1, 2], 7 on ranks [3]"


def test_constants_and_element_types_count() -> None:
    config, cluster = instance()
    slower = dataclasses.replace(cluster.cost_model, attention_us_per_token=cluster.cost_model.attention_us_per_token * 1.001)
    difference = check(instance(), (config, dataclasses.replace(cluster, cost_model=slower)))
    assert difference is not None and difference.startswith("attention_us_per_token of the cost model is ")
    difference = check(instance(), instance(), dtypes=(torch.bfloat16, torch.float16))
    assert difference == "the element type of the KV pool is torch.bfloat16 on instances [0], torch.float16 on instances [1]"


def test_every_setting_is_compared() -> None:
    """One that is added later, too."""
    names = {"served_model": "the served model", "num_nodes": "--nnodes"}
    facts = facts_of(*instance(), torch.bfloat16)
    for field in dataclasses.fields(DynCpConfig):
        assert names.get(field.name, f"--dyncp-{field.name.replace('_', '-')}") in facts
    for field in dataclasses.fields(instance()[1].cost_model):
        assert f"{field.name} of the cost model" in facts


def test_the_difference_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    one = instance()
    others = {name: "other" if name == "--page-size" else value for name, value in facts_of(*one, torch.bfloat16).items()}
    monkeypatch.setattr(agreement, "tell_everybody", lambda own, group: [own, others])
    with pytest.raises(AgreementError, match=r"instances do not agree: --page-size is 16 on instances \[0\], other on instances \[1\]"):
        check_agreement(*one, torch.bfloat16, None)  # type: ignore[arg-type]
