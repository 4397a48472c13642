"""Every flag of dynamic context parallelism with its default and its check, in one frozen dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_dcp.policy.cost_model import available_cost_models
from sglang_dcp.policy.served_model import ServedModel
from sglang_dcp.policy.split_limits import Layout, SplitLimits, SplitRule

POLICIES = ("dual-balance", "length-buckets", "fixed", "local")
TRANSPORTS = ("auto", "gloo", "nccl", "peer")
SCOPES = ("node", "cluster")
SPLIT_BUDGETS = ("auto", "stock")

CONFIG_VARIABLE = "SGLANG_DYNCP_CONFIG"
"""Carries the parsed configuration from the main process to its children; set by our flags hook, never by users."""


class ConfigError(ValueError):
    """A setting that cannot work; the message names flag, value and limit."""


@dataclass(frozen=True)
class DynCpConfig:
    """Settings of one server. `None` stands for "number of instances" and is resolved by `resolve`.

    cost_model None: the constants that fit the served model best. served_model: no setting; read off the model by the main process.
    num_nodes: no setting of ours either; SGLang's --nnodes, the hosts. node_size None: all instances of a host.
    """

    policy: str = "dual-balance"
    degree: int | None = None
    max_degree: int | None = None
    max_guest_fraction: float = 1.0
    node_size: int | None = None
    scope: str = "node"
    cost_model: str | None = None
    transport: str = "auto"
    max_rows: int = 64
    split_budget: str = "auto"
    cache_fraction: float = 0.0
    cache_min_tokens: int = 1024
    hang_seconds: float = 60.0
    drain_seconds: float = 300.0
    served_model: ServedModel | None = field(default=None, metadata={"flag": False})
    num_nodes: int = field(default=1, metadata={"flag": False})

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"--dyncp-policy {self.policy!r} is unknown; choose one of {', '.join(POLICIES)}")
        if self.transport not in TRANSPORTS:
            raise ConfigError(f"--dyncp-transport {self.transport!r} is unknown; choose one of {', '.join(TRANSPORTS)}")
        if self.scope not in SCOPES:
            raise ConfigError(f"--dyncp-scope {self.scope!r} is unknown; choose one of {', '.join(SCOPES)}")
        if self.split_budget not in SPLIT_BUDGETS:
            raise ConfigError(f"--dyncp-split-budget {self.split_budget!r} is unknown; choose one of {', '.join(SPLIT_BUDGETS)}")
        if self.policy == "fixed" and self.degree is None:
            raise ConfigError("--dyncp-policy fixed needs --dyncp-degree K")
        if self.policy != "fixed" and self.degree is not None:
            raise ConfigError(f"--dyncp-degree {self.degree} works with --dyncp-policy fixed only, not with {self.policy!r}")
        if self.policy == "local":
            self._refuse_shards()
        counts = {"--dyncp-degree": self.degree, "--dyncp-max-degree": self.max_degree, "--dyncp-node-size": self.node_size}
        for flag, value in (*counts.items(), ("--dyncp-max-rows", self.max_rows)):
            if value is not None and value < 1:
                raise ConfigError(f"{flag} must be at least 1, got {value}")
        for flag, seconds in (("--dyncp-hang-seconds", self.hang_seconds), ("--dyncp-drain-seconds", self.drain_seconds)):
            if not 0.0 <= seconds < math.inf:
                raise ConfigError(f"{flag} must be a number of seconds, 0 or more, got {seconds}")
        if not 0.0 <= self.max_guest_fraction <= 1.0:
            raise ConfigError(f"--dyncp-max-guest-fraction must lie in [0, 1], got {self.max_guest_fraction}")
        if not 0.0 <= self.cache_fraction <= 1.0:
            raise ConfigError(f"--dyncp-cache-fraction must lie in [0, 1], got {self.cache_fraction}")
        if self.cache_min_tokens < 1:
            raise ConfigError(f"--dyncp-cache-min-tokens must be at least 1, got {self.cache_min_tokens}")
        if self.cost_model is not None and self.cost_model not in available_cost_models() and not os.path.isfile(self.cost_model):
            known = ", ".join(available_cost_models())
            raise ConfigError(f"--dyncp-cost-model {self.cost_model!r} is not a file, and none of those that ship: {known}")

    def _refuse_shards(self) -> None:
        """What says how far requests are sharded would be passed over by a policy that shards none. Its own degree is 1 (`resolve`)."""
        said = (
            ("--dyncp-max-degree", self.max_degree, (None, 1)),
            ("--dyncp-max-guest-fraction", self.max_guest_fraction, (1.0,)),
            ("--dyncp-scope", self.scope, ("node",)),
        )
        for flag, value, silent in said:
            if value not in silent:
                raise ConfigError(f"{flag} {value} has no effect with --dyncp-policy local, which shards no request")

    def resolve(self, num_instances: int) -> DynCpConfig:
        """Fills in what depends on the number of instances, and checks it."""
        most = self.layout(num_instances).group_size
        for flag, value in (("--dyncp-degree", self.degree), ("--dyncp-max-degree", self.max_degree)):
            if value is not None and value > num_instances:
                raise ConfigError(f"{flag} {value} exceeds the number of instances, {num_instances} (--tp)")
            if value is not None and value > most:
                raise ConfigError(
                    f"{flag} {value} exceeds the {most} instances of a node (--dyncp-node-size, --nnodes {self.num_nodes}), which requests "
                    "do not leave without --dyncp-scope cluster"
                )
        max_degree = 1 if self.policy == "local" else self.max_degree or self.degree or most
        if self.degree is not None and self.degree > max_degree:
            raise ConfigError(f"--dyncp-degree {self.degree} exceeds --dyncp-max-degree {max_degree}")
        return dataclasses.replace(self, max_degree=max_degree)

    def layout(self, num_instances: int) -> Layout:
        """Which instances share a node. ConfigError where hosts or nodes would differ in size, or a node would lie on two hosts."""
        if num_instances % self.num_nodes:
            raise ConfigError(f"{num_instances} instances (--tp) cannot be spread evenly over --nnodes {self.num_nodes}")
        per_host = num_instances // self.num_nodes
        node_size = self.node_size or per_host
        if per_host % node_size:
            raise ConfigError(f"--dyncp-node-size {node_size} does not divide the {per_host} instances of a host (--tp, --nnodes)")
        return Layout(num_instances, node_size, crosses=self.scope == "cluster")

    def split_limits(self, num_instances: int, pool_pages: int) -> SplitLimits:
        """How a request may be split over `num_instances` pools of `pool_pages` each; the same in every process."""
        max_degree = self.resolve(num_instances).max_degree or num_instances
        layout = self.layout(num_instances)
        return SplitRule(max_degree, self.max_guest_fraction, layout.crosses).limits(pool_pages, layout)

    def most_retained(self, num_pages: int) -> int:
        """Pages of a pool of num_pages that retained sequences may hold; 0 for no prefix cache of sharded requests."""
        return int(self.cache_fraction * num_pages)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DynCpConfig:
        values = json.loads(text)
        served = values.pop("served_model", None)
        return cls(**values, served_model=None if served is None else ServedModel(**served))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> DynCpConfig | None:
        """The configuration that the main process handed down, or None where dyncp is off."""
        text = environment.get(CONFIG_VARIABLE)
        return cls.from_json(text) if text else None

    @classmethod
    def from_namespace(cls, args: argparse.Namespace) -> DynCpConfig | None:
        """The parsed flags, or None without --enable-dyncp. A --dyncp-* flag without it is refused."""
        names = [item.name for item in dataclasses.fields(cls) if item.metadata.get("flag", True)]
        given: dict[str, Any] = {name: getattr(args, f"dyncp_{name}", None) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        if not getattr(args, "enable_dyncp", False):
            if given:
                raise ConfigError(f"--dyncp-{next(iter(given)).replace('_', '-')} has no effect without --enable-dyncp")
            return None
        if "cache_min_tokens" in given and "cache_fraction" not in given:
            raise ConfigError(f"--dyncp-cache-min-tokens {given['cache_min_tokens']} has no effect without --dyncp-cache-fraction")
        return cls(**given, num_nodes=getattr(args, "nnodes", 1))


def add_cli_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds our flags to SGLang's parser (or to `sglang-dcp serve --help`). Defaults are None so that a given flag can be told."""
    group = parser.add_argument_group("dynamic context parallelism (sglang_dcp)")
    group.add_argument("--enable-dyncp", action="store_true", help="Give every request its own context-parallel degree while it decodes.")
    group.add_argument("--dyncp-policy", choices=POLICIES, help="How requests are placed. Default: dual-balance.")
    group.add_argument("--dyncp-degree", type=int, metavar="K", help="Degree of every request, with --dyncp-policy fixed.")
    group.add_argument("--dyncp-max-degree", type=int, metavar="K", help="Most shards of one request. Default: the instances of a node.")
    group.add_argument(
        "--dyncp-max-guest-fraction",
        type=float,
        metavar="F",
        help="Most of an instance's KV pool that new guests may take; growth of a guest already there is not bounded. Default: 1.0.",
    )
    group.add_argument(
        "--dyncp-cost-model",
        metavar="FILE|NAME",
        help="Step-time constants: a JSON file (see `sglang-dcp calibrate`) or some that ship, per layer. Default: those that ship, "
        "scaled to the served model.",
    )
    group.add_argument("--dyncp-transport", choices=TRANSPORTS, help="How rows travel between instances. Default: auto.")
    group.add_argument(
        "--dyncp-cache-fraction",
        type=float,
        metavar="F",
        help="Most of an instance's KV pool that finished sharded requests may keep for later turns, while nobody needs it. "
        "Default: 0, none.",
    )
    group.add_argument(
        "--dyncp-cache-min-tokens",
        type=int,
        metavar="N",
        help="Shortest sharded request that is kept for later turns, in tokens. Default: 1024.",
    )
    group.add_argument("--dyncp-max-rows", type=int, metavar="S", help="Most guest rows per instance of a decode graph. Default: 64.")
    group.add_argument(
        "--dyncp-split-budget",
        choices=SPLIT_BUDGETS,
        help="How decodes split long rows (GQA): auto, whatever stands beside them, or stock, as the kernel does. Default: auto.",
    )
    _add_node_arguments(group)
    _add_ending_arguments(group)


def _add_node_arguments(group: argparse._ArgumentGroup) -> None:
    """Where the shards of a request may lie in a server of several nodes."""
    group.add_argument(
        "--dyncp-node-size",
        type=int,
        metavar="N",
        help="Instances whose GPUs reach each other's memory: a request's shards lie in one such node. Default: a host's (--nnodes).",
    )
    group.add_argument(
        "--dyncp-scope",
        choices=SCOPES,
        help="How far the shards of a request may lie apart: in one node, or anywhere in the cluster where no node can hold it (such steps "
        "run without graphs). Default: node.",
    )


def _add_ending_arguments(group: argparse._ArgumentGroup) -> None:
    """When a server gives up, and how long it waits for its clients."""
    group.add_argument(
        "--dyncp-hang-seconds",
        type=float,
        metavar="S",
        help="End the server with exit code 75 when requests are open and no instance has made a step for so long; 0 never. Default: 60.",
    )
    group.add_argument(
        "--dyncp-drain-seconds",
        type=float,
        metavar="S",
        help="Longest time after SIGTERM for open requests to end by themselves; then they get HTTP 503. Default: 300.",
    )
