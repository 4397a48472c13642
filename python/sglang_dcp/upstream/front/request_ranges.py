"""Every field of a request and its range, as data, and the checks that use it before a request leaves the main process.

A scheduler that meets a value out of range ends, and with it all instances: they step together. SGLang looks at some fields only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sglang_dcp.upstream.front.field_kinds import (
    INT32,
    INT64,
    LARGEST_FLOAT32,
    SMALLEST_FLOAT32,
    Biases,
    Choice,
    Elsewhere,
    Flag,
    Integer,
    Kind,
    Parameters,
    Positions,
    RangeError,
    Real,
    Sizes,
    Strings,
    Text,
    Texts,
    TokenIds,
    refuse,
)

MOST_SAMPLES = 4096
"""Largest `n`: the main process makes a copy of the request for each."""

SMALLEST_PENALTY = 1e-6
"""Smallest repetition_penalty: logits are divided by it and must stay finite."""

LARGEST_TIME = 1e12
"""Seconds; a request's times are differences with it, which are shown and counted."""

SAMPLING: Mapping[str, Kind] = {
    "max_new_tokens": Integer(0, INT32),
    "min_new_tokens": Integer(0, INT32),
    "n": Integer(1, MOST_SAMPLES),
    "beam_width": Integer(1, INT32),
    "temperature": Real(0, LARGEST_FLOAT32),
    "top_p": Real(SMALLEST_FLOAT32, 1),
    "top_k": Integer(1, 1 << 30, also=(-1,)),
    "min_p": Real(0, 1),
    "frequency_penalty": Real(-2, 2),
    "presence_penalty": Real(-2, 2),
    "repetition_penalty": Real(SMALLEST_PENALTY, 2),
    "stop": Texts(),
    "stop_regex": Texts(patterns=True),
    "stop_token_ids": TokenIds(holes=True),
    "logit_bias": Biases(),
    "json_schema": Text(),
    "regex": Text(),
    "ebnf": Text(),
    "ebnf_full_assistant": Flag(),
    "structural_tag": Text(),
    "ignore_eos": Flag(),
    "skip_special_tokens": Flag(),
    "spaces_between_special_tokens": Flag(),
    "no_stop_trim": Flag(),
    "stream_interval": Integer(0, INT32),
    "sampling_seed": Integer(-INT64 - 1, INT64),
    "custom_params": Parameters(),
    "watermark": Elsewhere("SGLang's normalize_watermark_request refuses what is wrong"),
}
"""The keys of sampling_params. Others are refused: SGLang's struct has fields of its own that a client must not set."""

NOT_NULL = ("n", "ebnf_full_assistant")
"""Parameters for whose null SGLang puts in no default."""

GREEDY_BELOW = 1e-6
"""A temperature below it makes SGLang take the best token, whatever top_k is."""
GREEDY_TOP_K = Integer(-INT64 - 1, INT64)

MAIN_ONLY = Elsewhere("read in the main process alone")
MEDIA = Elsewhere("read beside media only, and those are refused")

REQUEST: Mapping[str, Kind] = {
    "rid": Text(),
    "input_ids": TokenIds(),
    "token_ids_logprob": TokenIds(),
    "top_logprobs_num": Integer(0, "vocabulary"),
    "logprob_start_len": Integer(-1, "prompt"),
    "return_logprob": Flag(),
    "return_sampling_mask": Flag(),
    "return_flat_raw_top_logprobs": Flag(),
    "stream": Flag(),
    "return_routed_experts": Flag(),
    "routed_experts_start_len": Integer(0, "prompt"),
    "return_indexer_topk": Flag(),
    "require_reasoning": Flag(),
    "max_thinking_tokens": Integer(0, INT32),
    "custom_logit_processor": Text(),
    "token_indices_to_pool": Positions(),
    "multi_item_delimiter_indices": Positions(),
    "session_id": Text(),
    "routing_key": Text(),
    "extra_key": Text(),
    "cache_salt": Text(),
    "http_worker_ipc": Text(),
    "priority": Integer(-INT64 - 1, INT64),
    "bootstrap_host": Text(),
    "bootstrap_port": Integer(0, 65535),
    "bootstrap_room": Integer(0, INT64),
    "bootstrap_pair_key": Text(),
    "decode_tp_size": Integer(1, INT32),
    "disagg_prefill_dp_rank": Integer(0, INT32),
    "lora_id": Text(),
    "text": Elsewhere("its token ids are looked at"),
    "sampling_params": Elsewhere("check_sampling looks at every key"),
    "sampling_logprobs_mode": Choice(("selected", "support")),
    "watermark": SAMPLING["watermark"],
    "routed_dp_rank": Elsewhere("RequestLimits.check compares it with the number of instances"),
    "data_parallel_rank": Elsewhere("becomes routed_dp_rank"),
    "kv_hints": Elsewhere("SGLang decodes the envelope, and our own action is taken out"),
    "return_text_in_logprobs": MAIN_ONLY,
    "return_flat_raw_output_top_logprobs": MAIN_ONLY,
    "return_flat_raw_top_logprobs_b64": MAIN_ONLY,
    "return_prompt_token_ids": MAIN_ONLY,
    "return_entropy": MAIN_ONLY,
    "return_bytes": MAIN_ONLY,
    "log_metrics": MAIN_ONLY,
    "no_logs": MAIN_ONLY,
    "background": MAIN_ONLY,
    "conversation_id": MAIN_ONLY,
    "custom_labels": Strings(),
    "external_trace_header": Strings(),
    "received_time": Real(0, LARGEST_TIME),
    "mm_hashes": MEDIA,
    "mm_content_hashes": MEDIA,
    "use_audio_in_video": MEDIA,
    "video_config": MEDIA,
    "modalities": MEDIA,
    "need_wait_for_mm_inputs": Flag(),
    "max_dynamic_patch": MEDIA,
    "min_dynamic_patch": MEDIA,
    "image_max_dynamic_patch": MEDIA,
    "video_max_dynamic_patch": MEDIA,
    "images_config": MEDIA,
    "mm_processor_kwargs": MEDIA,
}
"""The fields of SGLang's GenerateReqInput for one prompt, but those that are refused (REFUSED_OPTIONS)."""

IGNORED_UNLESS: Mapping[str, str] = {"logprob_start_len": "return_logprob", "routed_experts_start_len": "return_routed_experts"}
"""Fields whose range SGLang does not look at unless the other one is set; their type still has to be right."""

ONE_PER_PROMPT = (
    "rid",
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "return_sampling_mask",
    "sampling_logprobs_mode",
    "custom_logit_processor",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
    "decode_tp_size",
    "return_hidden_states",
    "lora_path",
)
"""Fields that may be a list with an entry per prompt of a batch."""

WITHOUT_NULLS = ("rid", "return_logprob", "logprob_start_len", "top_logprobs_num", "return_sampling_mask", "return_hidden_states")
"""Of these a list has a value for each prompt."""
LOOKED_AT_FIRST = ("rid", "bootstrap_room")
"""Fields with which SGLang computes while it takes a batch apart."""

READ_BY_ENTRY = ("lora_id", "multi_item_delimiter_indices", "token_indices_to_pool", "modalities")
"""Of these SGLang reads an entry for each prompt of a batch, and for each sample."""
MULTIPLIED = ("audio_data", "video_data")
"""The same, but a list is repeated for each sample."""


def check_body(request: Any, sizes: Sizes) -> None:
    """Before SGLang takes a request apart: shapes of lists, and all sampling parameters. Raises RangeError."""
    sampling = getattr(request, "sampling_params", None)
    every = sampling if isinstance(sampling, list) else [{} if sampling is None else sampling]
    for parameters in every:
        check_sampling(parameters, sizes)
    num_prompts, samples = _num_prompts(request), max((parameters.get("n", 1) for parameters in every), default=1)
    if num_prompts is None and samples > 1:
        num_prompts = 1
    _check_prompts(getattr(request, "text", None), getattr(request, "input_ids", None), num_prompts, samples)
    for name in ONE_PER_PROMPT:
        _check_shape(name, getattr(request, name, None), num_prompts)
    for name in LOOKED_AT_FIRST:
        _check_each(name, getattr(request, name, None), sizes)
    if num_prompts is not None:
        _check_entries(request, num_prompts, samples)
    ids = getattr(request, "token_ids_logprob", None)
    if isinstance(ids, list) and any(isinstance(item, list) for item in ids):
        _check_shape("token_ids_logprob", ids, num_prompts)


def check_sampling(parameters: Any, sizes: Sizes) -> None:
    """Raises RangeError unless `parameters` are sampling parameters of one prompt."""
    if not isinstance(parameters, dict):
        raise refuse("sampling_params", "an object", parameters)
    is_greedy = _is_greedy(parameters.get("temperature"))
    for name, value in parameters.items():
        kind = GREEDY_TOP_K if is_greedy and name == "top_k" else SAMPLING.get(name)
        if kind is None:
            raise RangeError(f"sampling_params has no {name!r}; there are {', '.join(SAMPLING)}")
        if value is not None or name in NOT_NULL:
            kind.check(name, value, sizes)


def _is_greedy(temperature: Any) -> bool:
    return type(temperature) in (int, float) and 0 <= temperature < GREEDY_BELOW


def check_labels(labels: Any, allowed: Collection[str]) -> None:
    """custom_labels beside metrics that have the labels `allowed`: another name would end the process that counts. Raises RangeError."""
    for name in labels or ():
        if name not in allowed:
            there = f"{', '.join(allowed) or 'none'}; --tokenizer-metrics-allowed-custom-labels"
            raise refuse("custom_labels", f"labels of the metrics ({there})", name)


def check_prompt(request: Any, input_ids: Sequence[int] | None, vocabulary: int) -> None:
    """One prompt, tokenized, and the fields that go with it. Raises RangeError."""
    sizes = Sizes(vocabulary, len(input_ids or ()))
    if not sizes.prompt:
        raise RangeError("the prompt is empty: give at least one token")
    REQUEST["input_ids"].check("input_ids", input_ids, sizes)
    for name, kind in REQUEST.items():
        value = getattr(request, name, None)
        if value is None or name == "input_ids":
            continue
        if name in IGNORED_UNLESS and not getattr(request, IGNORED_UNLESS[name], False):
            kind = Integer(-INT64 - 1, INT64)
        kind.check(name, value, sizes)


def _num_prompts(request: Any) -> int | None:
    """None for a single prompt. Raises RangeError where a batch is not made of prompts."""
    text, ids = getattr(request, "text", None), getattr(request, "input_ids", None)
    if text is not None:
        Texts().check("text", text, Sizes(0))
    if ids is not None and not isinstance(ids, Sequence):
        raise refuse("input_ids", "a list of token ids", ids)
    if isinstance(text, list):
        return len(text)
    if text is None and isinstance(ids, list) and ids and not isinstance(ids[0], int):
        for index, row in enumerate(ids):
            if not isinstance(row, list):
                raise refuse(f"input_ids[{index}]", "a list of token ids", row)
        return len(ids)
    return None


def _check_entries(request: Any, num_prompts: int, samples: int) -> None:
    for name in (*READ_BY_ENTRY, *MULTIPLIED):
        value = getattr(request, name, None)
        if value is None or (name == "modalities" and not value):
            continue
        if name in READ_BY_ENTRY and (samples > 1 or not isinstance(value, list)):
            raise refuse(name, "a list with an entry per prompt (n 1)", value)
        _check_shape(name, value, num_prompts)


def _check_each(name: str, value: Any, sizes: Sizes) -> None:
    for item in value if isinstance(value, list) else [value]:
        if item is not None:
            REQUEST[name].check(name, item, sizes)


def _check_prompts(text: Any, ids: Any, num_prompts: int | None, samples: int) -> None:
    """Of several prompts or samples, SGLang multiplies the texts alone."""
    if text is None or ids is None or num_prompts is None:
        return
    if samples > 1 or not isinstance(ids, list) or len(ids) != num_prompts or not all(isinstance(row, list) for row in ids):
        raise RangeError("text and input_ids say different prompts: give one of them")


def _check_shape(name: str, value: Any, num_prompts: int | None) -> None:
    if not isinstance(value, list):
        return
    if num_prompts is None:
        raise refuse(name, "one value for a single prompt", value)
    if len(value) != num_prompts:
        raise RangeError(f"{name} has {len(value)} entries for {num_prompts} prompts")
    if name in WITHOUT_NULLS and None in value:
        raise refuse(name, "a list with a value for each prompt", value)
