"""/v1/completions, /v1/chat/completions, /v1/responses."""

from __future__ import annotations

import json
from typing import Any

from benchmark.serving.conformance.case import Case, variants
from benchmark.serving.conformance.native import IDS, OTHER_IDS, SCHEMA, TEXT

COMPLETION = {"model": "default", "prompt": TEXT, "max_tokens": 5, "temperature": 0}
HELLO = [{"role": "user", "content": "hello there"}]
CHAT = {"model": "default", "messages": HELLO, "max_tokens": 5, "temperature": 0}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": SCHEMA}}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
RANK = "X-Data-Parallel-Rank"
ALIKE: dict[str, dict[str, Any]] = {
    "plain": {},
    "stream": {"stream": True},
    "usage": USAGE,
    "usage in every chunk": {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "no usage": {"stream": True, "stream_options": {"include_usage": False}},
    "n": {"n": 2},
    "n, stream": USAGE | {"n": 2},
    "stop": {"stop": ["a", "e"]},
    "stop, text": {"stop": " "},
    "no limit": {"max_tokens": None, "stop": [" ", "e", "a"]},
    "0 tokens": {"max_tokens": 0},
    "-1 tokens": {"max_tokens": -1},
    "seed": {"seed": 5},
    "user": {"user": "u"},
    "bias": {"logit_bias": {"70": 100}},
    "bad bias": {"logit_bias": {"x": 100}},
    "penalties": {"frequency_penalty": 1, "presence_penalty": 1},
    "penalty 3": {"frequency_penalty": 3},
    "top_p 0": {"top_p": 0},
    "hot": {"temperature": -1},
    "text for a number": {"temperature": "x"},
    "top_k": {"top_k": 1},
    "drawn from one": {"temperature": 0.9, "top_k": 1},
    "top_k 0": {"top_k": 0},
    "min_p": {"min_p": 0.1},
    "repetition": {"repetition_penalty": 1.2},
    "min tokens": {"min_tokens": 3},
    "regex": {"regex": "[0-9]{3}"},
    "bad regex": {"regex": "("},
    "ebnf": {"ebnf": 'root ::= "ab"'},
    "stop ids": {"stop_token_ids": [13, 257]},
    "stop regex": {"stop_regex": "[a-z]"},
    "untrimmed": {"stop": ["a"], "no_stop_trim": True},
    "ignore eos": {"ignore_eos": True},
    "special tokens": {"skip_special_tokens": False},
    "rid": {"rid": "conformance-o"},
    "extra": {"extra_key": "x", "cache_salt": "y"},
    "session id": {"session_id": "s"},
    "priority": {"priority": 3},
    "priority -3": {"priority": -3},
    "bad priority": {"priority": "x"},
    "rank": {"routed_dp_rank": 1},
    "rank 9": {"routed_dp_rank": 9},
    "old rank": {"data_parallel_rank": 1},
    "parameters": {"custom_params": {"a": 1}},
    "processor": {"custom_logit_processor": "x"},
    "adapter": {"lora_path": "a"},
    "no adapter": {"lora_path": None},
    "adapter by name": {"model": "default:a"},
    "hidden states": {"return_hidden_states": True},
    "experts": {"return_routed_experts": True},
    "token ids": {"return_token_ids": True},
    "cached": {"return_cached_tokens_details": True},
    "unknown": {"whatever": 1},
    "another model": {"model": "other"},
    "no model": {"model": None},
    "json": {"response_format": {"type": "json_object"}, "max_tokens": 24},
    "schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
        "max_tokens": 32,
    },
    "bad format": {"response_format": {"type": "x"}},
    "session": {"session_params": {"id": "s"}},
}
"""What both take in one way."""

COMPLETIONS: dict[str, dict[str, Any]] = {
    "ids": {"prompt": IDS},
    "texts": {"prompt": [TEXT, "a b c"]},
    "lists of ids": {"prompt": [IDS, OTHER_IDS]},
    "texts, n": {"prompt": [TEXT, "a b"], "n": 2},
    "texts, stream": USAGE | {"prompt": [TEXT, "a b"]},
    "nothing": {"prompt": ""},
    "no prompts": {"prompt": []},
    "no prompt": {"prompt": None},
    "echo": {"echo": True},
    "echo, stream": {"echo": True, "stream": True},
    "echo, logprobs": {"echo": True, "logprobs": 1},
    "echo, n": {"echo": True, "n": 2},
    "echo of ids": {"echo": True, "prompt": IDS},
    "suffix": {"suffix": "x"},
    "best_of": {"best_of": 2},
    "logprobs": {"logprobs": 3},
    "logprobs 0": {"logprobs": 0},
    "logprobs, stream": {"logprobs": 2, "stream": True},
    "schema text": {"json_schema": json.dumps(SCHEMA), "max_tokens": 32},
    "long": {"prompt": "a" * 5000},
    "labels": {"custom_labels": {}},
}
LAST = [*HELLO, {"role": "assistant", "content": "well"}]
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
CHATS: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "logprobs, stream": {"logprobs": True, "top_logprobs": 1, "stream": True},
    "top alone": {"top_logprobs": 2},
    "completion tokens": {"max_tokens": None, "max_completion_tokens": 2},
    "no messages": {"messages": []},
    "without": {"messages": None},
    "unknown role": {"messages": [{"role": "x", "content": "y"}]},
    "no content": {"messages": [{"role": "user", "content": None}]},
    "nothing": {"messages": [{"role": "user", "content": ""}]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
    "system": {"messages": [{"role": "system", "content": "be short"}, *HELLO]},
    "developer": {"messages": [{"role": "developer", "content": "be short"}, *HELLO]},
    "turns": {"messages": [*LAST, *HELLO]},
    "continued": {"messages": LAST, "continue_final_message": True},
    "nothing to continue": {"continue_final_message": True},
    "tools": {"tools": [TOOL]},
    "tools, none": {"tools": [TOOL], "tool_choice": "none"},
    "tools, required": {"tools": [TOOL], "tool_choice": "required", "max_tokens": 40},
    "tools, required, stream": {"tools": [TOOL], "tool_choice": "required", "max_tokens": 40, "stream": True},
    "tools, named": {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}, "max_tokens": 40},
    "tools, unknown": {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "z"}}},
    "choice without tools": {"tool_choice": "required"},
    "tool messages": {
        "messages": [
            *HELLO,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "4"},
        ],
        "tools": [TOOL],
    },
    "tools, parallel": {"tools": [TOOL], "parallel_tool_calls": False},
    "effort": {"reasoning_effort": "low"},
    "no effort": {"reasoning_effort": "none"},
    "reasoning": {"separate_reasoning": False},
    "template": {"chat_template_kwargs": {"enable_thinking": False}},
    "ids": {"input_ids": IDS},
    "prompt ids": {"return_prompt_token_ids": True},
    "meta": {"return_meta_info": True},
    "meta, stream": {"return_meta_info": True, "stream": True},
    "store": {"store": True},
    "long": {"messages": [{"role": "user", "content": "a" * 5000}]},
    "image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    "ids in the extension": {"return_input_ids_in_sglext": True, "return_output_ids_in_sglext": True},
    "mask": {"return_sampling_mask": True},
}
RESPONSE = {"model": "default", "input": "hello there", "max_output_tokens": 8, "temperature": 0, "store": False}
RESPONSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no model": {"model": None},
    "instructions, stream": {"instructions": "be short", "stream": True},
    "stream": {"stream": True},
    "messages": {"input": HELLO},
    "instructions": {"instructions": "be short"},
    "tools": {"tools": [{"type": "function", "name": "add", "parameters": SCHEMA}]},
    "stored": {"store": True},
    "no such answer": {"previous_response_id": "resp_x"},
    "id of another kind": {"previous_response_id": "x"},
    "background": {"background": True},
    "logprobs": {"top_logprobs": 2, "include": ["message.output_text.logprobs"]},
    "metadata": {"metadata": {"a": "b"}},
    "reasoning": {"reasoning": {"effort": "low"}},
    "nothing": {"input": ""},
    "no input": {"input": None},
    "format": {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 30},
    "tier": {"service_tier": "auto"},
    "priority": {"priority": 3},
    "0 tokens": {"max_output_tokens": 0},
    "top_p": {"top_p": 0.9},
    "truncation": {"truncation": "auto"},
}


def openai_cases() -> list[Case]:
    return [
        *_with_ranks("completion", "/v1/completions", COMPLETION, COMPLETIONS),
        *_with_ranks("chat", "/v1/chat/completions", CHAT, CHATS),
        Case("chat: SageMaker", "/invocations", CHAT),
        *variants("responses", "/v1/responses", RESPONSE, RESPONSES),
        Case("responses: get", "/v1/responses/resp_x", method="GET"),
        Case("responses: cancel", "/v1/responses/resp_x/cancel", {}),
    ]


def _with_ranks(name: str, path: str, base: dict[str, Any], own: dict[str, dict[str, Any]]) -> list[Case]:
    ranks = [Case(f"{name}: header {value!r}", path, base, headers={RANK: value}) for value in ("0", "1", "9", "x", "-1", "")]
    drawn = base | {"temperature": 0.9, "ignore_eos": True}
    changes: dict[str, dict[str, Any]] = {"plain": {}, "seed": {"seed": 1}, "n": {"n": 3}, "default": {"temperature": None}}
    return [*variants(name, path, base, ALIKE | own), *variants(f"{name}, drawn", path, drawn, changes, sampled=True), *ranks]
