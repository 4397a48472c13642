"""What all instances must have alike, compared once when they start: grants and plans are computed from it, on each instance alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch.distributed as dist

from sglang_dcp.config import DynCpConfig
from sglang_dcp.ledger.cluster import Cluster
from sglang_dcp.upstream.layers.peers import tell_everybody


class AgreementError(RuntimeError):
    """Instances were started with different settings, pools or constants; the message names the difference and the instances."""


def check_agreement(config: DynCpConfig, cluster: Cluster, pool_dtype: Any, group: dist.ProcessGroup) -> None:
    """Every process of every instance calls it, before the first step. group: of all of them. pool_dtype: element type of SGLang's KV pool.
    AgreementError on all of them."""
    difference = find_difference(tell_everybody(facts_of(config, cluster, pool_dtype), group), cluster.num_instances)
    if difference is not None:
        raise AgreementError(f"instances do not agree: {difference}")


def facts_of(config: DynCpConfig, cluster: Cluster, pool_dtype: Any) -> dict[str, str]:
    """By name, settings by their flag. As text: what prints alike is alike."""
    settings = dataclasses.asdict(config)
    facts = {
        "the SGLang version": version("sglang"),
        "the sglang_dcp version": version("sglang_dcp"),
        "the number of instances": cluster.num_instances,
        "the pages of a pool": cluster.num_pages,
        "--page-size": cluster.page_size,
        "the element type of the KV pool": pool_dtype,
        "--nnodes": settings.pop("num_nodes"),
        "the served model": settings.pop("served_model"),
    }
    facts |= {f"--dyncp-{name.replace('_', '-')}": value for name, value in settings.items()}
    facts |= {f"{name} of the cost model": value for name, value in dataclasses.asdict(cluster.cost_model).items()}
    return {name: str(value) for name, value in facts.items()}


def find_difference(everybody: Sequence[Mapping[str, str]], num_instances: int) -> str | None:
    """The first fact that processes (by rank) differ in, as "NAME is VALUE on instances [...], VALUE on instances [...]", or None. Where
    instances have several slices, ranks are named in their place."""
    where_is = "instances" if len(everybody) == num_instances else "ranks"
    for name in dict.fromkeys(name for facts in everybody for name in facts):
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(everybody):
            ranks.setdefault(facts.get(name, "unknown"), []).append(rank)
        if len(ranks) > 1:
            return f"{name} is " + ", ".join(f"{value} on {where_is} {where}" for value, where in ranks.items())
    return None
