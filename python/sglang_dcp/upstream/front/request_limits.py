"""Which requests a server can take: pins, length, options. Pure; every refusal names the value, the limit and the flag."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_dcp.config import DynCpConfig
from sglang_dcp.policy.placement import make_policy
from sglang_dcp.policy.split import num_pages
from sglang_dcp.policy.split_limits import Layout, SplitLimits
from sglang_dcp.policy.types import InstanceLoad, Placement, PlacementPolicy
from sglang_dcp.upstream.router.placement_request import cost_model_of, describe_request

logger = logging.getLogger(__name__)

PIN_KEYS = ("degree", "home", "at_most")


def is_true(value: Any) -> bool:
    return any(map(is_true, value)) if isinstance(value, list | tuple) else bool(value)


def is_there(value: Any) -> bool:
    return any(map(is_there, value)) if isinstance(value, list | tuple) else value is not None


def is_named(value: Any) -> bool:
    return any(item is not None and item != "" for item in (value if isinstance(value, list | tuple) else [value]))


def is_not_null(value: Any) -> bool:
    return value is not None


@dataclass(frozen=True)
class Option:
    """A field that is not served. acts: for which values SGLang would act on it."""

    reason: str
    acts: Callable[[Any], bool]


MEDIA = Option("multimodal prompts are not served", is_there)

REFUSED_OPTIONS: Mapping[str, Option] = {
    "session_params": Option("a session keeps KV rows that the ledger does not know", bool),
    "input_embeds": Option("prompts without token ids are not placed", is_not_null),
    "positional_embed_overrides": Option("prompts are token ids only", is_not_null),
    "return_hidden_states": Option("not tested with sharded requests", is_true),
    "lora_path": Option("LoRA is not tested with sharded requests", is_named),
    "image_data": MEDIA,
    "video_data": MEDIA,
    "audio_data": MEDIA,
    "num_items_assigned": Option(MEDIA.reason, is_not_null),
    "encoder_urls": Option(MEDIA.reason, is_not_null),
    "multi_item_delimiter_indices": Option("its attention mask is not causal", is_there),
}
"""Fields of SGLang's GenerateReqInput that are refused when set."""


class RequestError(ValueError):
    """A request that cannot be served; SGLang's endpoints answer HTTP 400 with the message."""


def _is_ignored(name: str, request: Any) -> bool:
    """SGLang drops embeddings beside a prompt in text or token ids."""
    return name == "input_embeds" and any(getattr(request, prompt, None) is not None for prompt in ("text", "input_ids"))


def check_options(request: Any) -> None:
    """Raises RequestError for an option that is not served. `request` has SGLang's field names; those it lacks are not set."""
    for name, option in REFUSED_OPTIONS.items():
        if option.acts(getattr(request, name, None)) and not _is_ignored(name, request):
            raise RequestError(f"{name} does not work with --enable-dyncp: {option.reason}")
    sampling = getattr(request, "sampling_params", None)
    for parameters in sampling if isinstance(sampling, list) else [sampling]:
        width = parameters.get("beam_width") if isinstance(parameters, dict) else None
        if width is not None and width != 1:
            raise RequestError(f"beam_width {width!r} does not work with --enable-dyncp: beams share pages, the ledger knows one owner")


def check_address(request: Any, mode: str, backend: str) -> None:
    """Raises RequestError for a request to a decode server that names no prefill server. mode, backend: --disaggregation-mode and
    --disaggregation-transfer-backend."""
    if mode != "decode" or backend == "fake":
        return
    for name in ("bootstrap_host", "bootstrap_room"):
        if getattr(request, name, None) is None:
            where = "requests reach a decode server by a router, which sends them to a prefill server too"
            raise RequestError(f"{name} is missing, and --disaggregation-mode is decode: {where}")


def read_pin(custom_params: Any, layout: Layout) -> dict[str, int]:
    """The placement that custom_params.dyncp pins; {} without one. Raises RequestError for what is no placement."""
    if custom_params is None:
        return {}
    if not isinstance(custom_params, dict):
        raise RequestError(f"custom_params must be an object, got {custom_params!r}")
    if "dyncp" not in custom_params:
        return {}
    pin = custom_params["dyncp"]
    if not isinstance(pin, dict):
        raise RequestError(f'custom_params.dyncp must be an object like {{"degree": 2, "home": 0}}, got {pin!r}')
    unknown = [key for key in pin if key not in PIN_KEYS]
    if unknown:
        raise RequestError(f"custom_params.dyncp.{unknown[0]} is unknown; there are {', '.join(PIN_KEYS)}")
    if type(pin.get("at_most", False)) is not bool:
        raise RequestError(f"custom_params.dyncp.at_most must be true or false, got {pin['at_most']!r}")
    if "at_most" in pin and "degree" not in pin:
        raise RequestError("custom_params.dyncp.at_most says how degree is meant, and there is none")
    where = f"--tp {layout.num_instances}"
    in_node = where if layout.group_size == layout.num_instances else f"the instances of a node, {where}"
    for key, first, last, flags in (("degree", 1, layout.group_size, in_node), ("home", 0, layout.num_instances - 1, where)):
        if key in pin and (type(pin[key]) is not int or not first <= pin[key] <= last):
            raise RequestError(f"custom_params.dyncp.{key} must be an integer in {first}..{last} ({flags}), got {pin[key]!r}")
    return dict(pin)


@dataclass(frozen=True)
class RequestLimits:
    """What this server holds. config: resolved. pool_tokens: KV pool of one instance."""

    config: DynCpConfig
    num_instances: int
    pool_tokens: int
    page_size: int
    policy: PlacementPolicy = field(init=False)
    split_limits: SplitLimits = field(init=False)

    def __post_init__(self) -> None:
        # The policy itself, asked about an idle cluster: what it could not place there, the router could never place.
        policy = make_policy(
            self.config.policy,
            num_instances=self.num_instances,
            page_size=self.page_size,
            cost_model=cost_model_of(self.config, self.num_instances),
            degree=self.config.degree,
            max_degree=self.config.max_degree or self.num_instances,
            max_guest_fraction=self.config.max_guest_fraction,
            crosses_nodes=self.config.layout(self.num_instances).crosses,
        )
        object.__setattr__(self, "policy", policy)
        object.__setattr__(self, "split_limits", self.config.split_limits(self.num_instances, self.pool_tokens // self.page_size))

    @property
    def reach_tokens(self) -> int:
        """Tokens that one request may hold over all pools that it may use."""
        return self.split_limits.reach_pages * self.page_size

    @property
    def most_tokens(self) -> int:
        """Prompt, in whole pages, and output of one request: behind them comes one tail page."""
        return self.reach_tokens - self.page_size - 1

    def truncate(self, input_ids: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
        """Cuts the prompt in place to what one request may hold, and returns sampling parameters with the output that is left; says so,
        as SGLang does where it cuts to the context length. Samples of a batch may share their parameters."""
        most_prompt = self.most_tokens // self.page_size * self.page_size
        if len(input_ids) > most_prompt:
            logger.warning("--allow-auto-truncate: the input, %d tokens, is cut to %d (%s)", len(input_ids), most_prompt, self._pools())
            del input_ids[most_prompt:]
        left = self.most_tokens - num_pages(len(input_ids), self.page_size) * self.page_size
        asked = sampling.get("max_new_tokens")
        if type(asked) is not int or asked <= left:
            return sampling
        logger.warning("--allow-auto-truncate: max_new_tokens, %d, is cut to %d (%s)", asked, left, self._pools())
        return {**sampling, "max_new_tokens": left}

    def check(self, prompt_tokens: int, sampling: Mapping[str, Any], routed_dp_rank: int | None = None) -> Placement:
        """Where an idle server would place the request. Raises RequestError (or the policy's CapacityError, also a ValueError) where it
        could not serve it."""
        pin = read_pin(sampling.get("custom_params"), self.split_limits.layout)
        if pin and self.config.policy == "local":
            raise RequestError(f"custom_params.dyncp {pin} has no effect with --dyncp-policy local")
        if routed_dp_rank is not None and (type(routed_dp_rank) is not int or not 0 <= routed_dp_rank < self.num_instances):
            raise RequestError(f"routed_dp_rank must be an integer in 0..{self.num_instances - 1} (--tp), got {routed_dp_rank!r}")
        if pin and routed_dp_rank is not None:
            raise RequestError(f"custom_params.dyncp {pin} and routed_dp_rank {routed_dp_rank} exclude each other")
        max_new_tokens = sampling.get("max_new_tokens")
        if max_new_tokens is not None and type(max_new_tokens) is not int:
            raise RequestError(f"max_new_tokens must be an integer, got {max_new_tokens!r}")
        self._check_length(prompt_tokens, max_new_tokens or 0)
        # Negative lengths are SGLang's to refuse, with its own words.
        request = describe_request(
            prompt_tokens,
            max_new_tokens and max(0, max_new_tokens),
            pin,
            self.reach_tokens,
            routed_dp_rank,
            page_size=self.page_size,
            largest_degree=self.split_limits.max_degree,
        )
        nodes = self.split_limits.layout.nodes
        loads = [InstanceLoad(rank=rank, node=node, kv_tokens=0, kv_capacity=self.pool_tokens) for rank, node in enumerate(nodes)]
        return self.policy.place(request, loads, self.page_size)

    def _check_length(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """SGLang would cut the output to what is left, without a word."""
        prompt_pages = num_pages(prompt_tokens, self.page_size)
        if prompt_pages * self.page_size + max_new_tokens > self.most_tokens:
            raise RequestError(
                f"The input ({prompt_tokens} tokens, {prompt_pages} pages of {self.page_size}) and max_new_tokens ({max_new_tokens}) "
                f"exceed {self.most_tokens} tokens, what one request may hold in {self._pools()} "
                "(--max-total-tokens, --mem-fraction-static, --dyncp-max-degree)"
            )

    def _pools(self) -> str:
        """Those that one request may use."""
        limits = self.split_limits
        pools = f"{limits.max_degree} KV pools of {self.pool_tokens} tokens"
        if limits.layout.group_size < self.num_instances:
            pools += f" of a node with {limits.layout.group_size} instances (--dyncp-node-size, --nnodes)"
        if limits.guest_pages < limits.pool_pages:
            fraction = self.config.max_guest_fraction
            pools += f", all but one of them lending {limits.guest_pages * self.page_size} (--dyncp-max-guest-fraction {fraction})"
        return pools
