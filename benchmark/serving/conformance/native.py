"""/generate: forms of a prompt, log-probabilities, fields of a request."""

from __future__ import annotations

from typing import Any

from benchmark.serving.conformance.case import Case, variants
from testing.recall import random_ids, recall_prompt

SAMPLING = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
IDS, OTHER_IDS = random_ids(40, seed=3), random_ids(70, seed=4)
LONG_IDS = random_ids(600, seed=5)
TEXT = recall_prompt(64, 0.3, seed=5).text
ONE = {"input_ids": IDS, "sampling_params": SAMPLING}
TWO = {"input_ids": [IDS, OTHER_IDS], "sampling_params": SAMPLING}
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
TEXTS = {"input_ids": None, "text": [TEXT, TEXT[:20]]}

SINGLE: dict[str, dict[str, Any]] = {
    "plain": {},
    "text": {"input_ids": None, "text": TEXT},
    "text beside ids": {"text": TEXT},
    "nothing": {"input_ids": None},
    "no ids": {"input_ids": []},
    "one token": {"input_ids": [7]},
    "several chunks": {"input_ids": LONG_IDS},
    "stream": {"stream": True},
    "stream of chunks": {"input_ids": LONG_IDS, "stream": True},
    "beyond the context": {"input_ids": [9] * 4500},
    "output beyond the context": {"sampling_params": SAMPLING | {"max_new_tokens": 4090}},
    "rid": {"rid": "conformance-a"},
    "rid again": {"rid": "conformance-a"},
    "text as words": {"input_ids": "5 6"},
    "floats": {"input_ids": [1.5]},
    "an object": {"input_ids": {"a": 1}},
    "a parameter list": {"sampling_params": [SAMPLING]},
    "parameters as text": {"sampling_params": "x"},
    "embeddings": {"input_ids": None, "input_embeds": [[0.5, 0.25]]},
    "embeddings beside ids": {"input_embeds": [[0.5]]},
    "an unknown field": {"whatever": 3},
}

SEVERAL: dict[str, dict[str, Any]] = {
    f"n {n}, {name}": {"sampling_params": SAMPLING | {"n": n}, "stream": stream, "input_ids": ids}
    for n in (1, 2, 4)
    for name, ids, stream in (("short", IDS, False), ("long", LONG_IDS, False), ("stream", IDS, True))
}

BATCH: dict[str, dict[str, Any]] = {
    "plain": {},
    "texts": TEXTS,
    "stream": {"stream": True},
    "of one": {"input_ids": [IDS]},
    "texts of one": TEXTS | {"text": [TEXT]},
    "without entries": TEXTS | {"text": []},
    "parameters each": {"sampling_params": [SAMPLING, SAMPLING | {"max_new_tokens": 3}]},
    "parameters of one": {"sampling_params": [SAMPLING]},
    "rids": {"rid": ["conformance-b", "conformance-c"]},
    "rid": {"rid": "conformance-d"},
    "same rids": {"rid": ["x", "x"]},
    "one rid": {"rid": ["x"]},
    "n": {"sampling_params": SAMPLING | {"n": 2}},
    "n, stream": {"sampling_params": SAMPLING | {"n": 2}, "stream": True},
    "logprobs each": {"return_logprob": [True, False]},
    "logprob starts": {"return_logprob": True, "logprob_start_len": [0, 5]},
    "top each": {"return_logprob": True, "top_logprobs_num": [1, 2]},
    "ids each": {"return_logprob": True, "token_ids_logprob": [[5], [6, 7]]},
    "logprob start of one": {"logprob_start_len": [0]},
    "n with lists": {"sampling_params": SAMPLING | {"n": 2}, "return_logprob": [True, True]},
    "salts": {"cache_salt": ["a", "b"]},
    "salt of one": {"cache_salt": ["a"]},
    "keys": {"extra_key": ["a", "b"]},
    "hidden states": {"return_hidden_states": [False, False]},
    "adapters": {"lora_path": [None, None]},
    "an adapter": {"lora_path": ["a", None]},
    "different n": {"sampling_params": [{"n": 1}, {"n": 2}]},
}

SCORED: dict[str, dict[str, Any]] = {
    "plain": {},
    "from 0": {"logprob_start_len": 0},
    "from 5": {"logprob_start_len": 5},
    "from -1": {"logprob_start_len": -1},
    "of chunks": {"logprob_start_len": 0, "input_ids": LONG_IDS},
    "top": {"top_logprobs_num": 3},
    "top of the prompt": {"top_logprobs_num": 2, "logprob_start_len": 0},
    "top 0": {"top_logprobs_num": 0},
    "ids": {"token_ids_logprob": [5, 6]},
    "ids of the prompt": {"token_ids_logprob": [5], "logprob_start_len": 0},
    "no ids": {"token_ids_logprob": []},
    "text": {"return_text_in_logprobs": True},
    "stream": {"stream": True, "top_logprobs_num": 2},
    "text of all": {"return_text_in_logprobs": True, "top_logprobs_num": 2, "logprob_start_len": 0},
    "flat": {"return_flat_raw_top_logprobs": True, "top_logprobs_num": 2, "logprob_start_len": 0},
    "flat output": {"return_flat_raw_output_top_logprobs": True, "top_logprobs_num": 2},
    "flat in base64": {
        "return_flat_raw_output_top_logprobs": True,
        "return_flat_raw_top_logprobs_b64": True,
        "top_logprobs_num": 2,
    },
    "base64 alone": {"return_flat_raw_top_logprobs_b64": True},
    "flat stream": {"return_flat_raw_output_top_logprobs": True, "stream": True},
    "n": {"sampling_params": SAMPLING | {"n": 2}, "top_logprobs_num": 2},
    "one new token": {"sampling_params": SAMPLING | {"max_new_tokens": 1}, "logprob_start_len": 0},
    "no new token": {"sampling_params": SAMPLING | {"max_new_tokens": 0}, "logprob_start_len": 0},
    "null": {"return_logprob": None, "top_logprobs_num": 2},
    "start without": {"return_logprob": False, "logprob_start_len": 500},
    "as text": {"return_logprob": "maybe"},
    "top as text": {"top_logprobs_num": "two"},
}

FIELDS: dict[str, dict[str, Any]] = {
    "entropy": {"return_entropy": True},
    "prompt ids": {"return_prompt_token_ids": True},
    "bytes": {"return_bytes": True},
    "unlogged": {"no_logs": True},
    "no metrics": {"log_metrics": False},
    "session id": {"session_id": "s"},
    "both sessions": {"session_id": "s", "session_params": {"id": "s"}},
    "no session": {"session_params": {}},
    "extra key": {"extra_key": "k"},
    "salt": {"cache_salt": "k"},
    "empty salt": {"cache_salt": ""},
    "salt list": {"cache_salt": ["k"]},
    "routing key": {"routing_key": "k"},
    "conversation": {"conversation_id": "c"},
    "background": {"background": True},
    "reasoning": {"require_reasoning": True},
    "hidden states": {"return_hidden_states": True},
    "last hidden state": {"return_hidden_states": "last"},
    "no hidden states": {"return_hidden_states": False},
    "adapter": {"lora_path": "a"},
    "no adapter": {"lora_path": ""},
    "processor": {"custom_logit_processor": "x"},
    "no processor": {"custom_logit_processor": None},
    "experts": {"return_routed_experts": True},
    "indexer": {"return_indexer_topk": True},
    "mask": {"return_sampling_mask": True},
    "mask and mode": {"return_sampling_mask": True, "sampling_logprobs_mode": "support"},
    "mode": {"sampling_logprobs_mode": "selected"},
    "mode unknown": {"sampling_logprobs_mode": "x"},
    "room": {"bootstrap_room": 3},
    "host": {"bootstrap_host": "h"},
    "no images": {"image_data": []},
    "image": {"image_data": "x"},
    "no audio": {"audio_data": [None]},
    "delimiters": {"multi_item_delimiter_indices": [3]},
    "no delimiters": {"multi_item_delimiter_indices": []},
    "watermark": {"watermark": {}},
    "hints": {"kv_hints": {}},
    "trace": {"external_trace_header": {"traceparent": "x"}},
    "received": {"received_time": 5.0},
    **{f"priority {value!r}": {"priority": value} for value in (-5, 0, 7, 2**40, "high", 1.5)},
    **{f"rank {value!r}": {"routed_dp_rank": value} for value in (0, 1, 2, -1, "1", 1.0, [0])},
    **{f"old rank {value!r}": {"data_parallel_rank": value} for value in (0, 1, 5)},
}


def native_cases() -> list[Case]:
    return [
        *variants("generate", "/generate", ONE, SINGLE | SEVERAL),
        *variants("batch", "/generate", TWO, BATCH),
        Case("generate: PUT", "/generate", ONE, method="PUT"),
        Case("generate: GET", "/generate", method="GET"),
        Case("generate: a list", "/generate", []),
        Case("generate: null", "/generate", "null"),
        *variants("logprobs", "/generate", ONE | {"return_logprob": True}, SCORED),
        *variants("field", "/generate", ONE, FIELDS),
    ]
