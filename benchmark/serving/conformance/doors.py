"""Every other door: Anthropic's, Ollama's, SageMaker's and Vertex AI's, scores, tokens, other kinds of models, state and control calls."""

from __future__ import annotations

from typing import Any

from benchmark.serving.conformance.case import Case, variants
from benchmark.serving.conformance.native import SAMPLING
from benchmark.serving.conformance.openai import HELLO, TOOL

CONTROL = "a control call that is refused by name (operator's guide, what is not served)"


ANTHROPIC: dict[str, dict[str, Any]] = {
    "plain": {},
    "stream": {"stream": True},
    "system": {"system": "be short"},
    "stop": {"stop_sequences": ["a"]},
    "tools": {"tools": [{"name": "add", "description": "adds", "input_schema": TOOL["function"]["parameters"]}]},
    "no tokens": {"max_tokens": 0},
    "without limit": {"max_tokens": None},
    "top_k": {"top_k": 1},
    "top_p": {"top_p": 2},
    "metadata": {"metadata": {"user_id": "u"}},
    "thinking": {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    "no messages": {"messages": []},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
}
CONTROLS: list[tuple[str, Any]] = [
    ("/flush_cache", None),
    ("/flush_cache?timeout=2", None),
    ("/flush_cache?timeout=-1", None),
    ("/abort_request", {"rid": "nobody"}),
    ("/abort_request", {"rid": ""}),
    ("/abort_request", {}),
    ("/abort_request", {"rid": 5}),
    ("/abort_request", {"abort_all": True}),
    ("/abort_request", {"abort_all": "x"}),
    ("/pause_generation", {"mode": "in_place"}),
    ("/continue_generation", {}),
    ("/pause_generation", {"mode": "abort"}),
    ("/continue_generation", {"torch_empty_cache": False}),
    ("/pause_generation", {}),
    ("/pause_generation", {"mode": "in_place"}),
    ("/continue_generation", {}),
    ("/continue_generation", {}),
    ("/pause_generation", {"mode": "x"}),
    ("/pause_generation", None),
    ("/continue_generation", None),
    ("/set_internal_state", {"server_args": {}}),
    ("/set_internal_state", {"server_args": {"unknown": 1}}),
    ("/set_internal_state", {"server_args": {"pp_max_micro_batch_size": 8}}),
    ("/set_internal_state", {}),
    ("/configure_logging", {}),
    ("/configure_logging", {"log_requests": False}),
    ("/freeze_gc", None),
    ("/slow_down", {"forward_sleep_time": None}),
    ("/update_weight_version", {"new_version": "conformance"}),
    ("/update_weight_version", {}),
    ("/weights_checker", {"action": "checksum"}),
    ("/weights_checker", {"action": "x"}),
    ("/get_weights_by_name", {}),
    ("/update_weights_from_disk", {}),
    ("/update_weights_from_tensor", {}),
    ("/update_weights_from_distributed", {}),
    ("/update_weights_from_ipc", {}),
    ("/init_weights_update_group", {}),
    ("/load_lora_adapter", {}),
    ("/unload_lora_adapter", {}),
    ("/open_session", {}),
    ("/close_session", {}),
    ("/close_session", {"session_id": "nobody"}),
    ("/separate_reasoning", {"text": "<think>a</think>b", "reasoning_parser": "qwen3"}),
    ("/parse_function_call", {"text": "x", "tools": [], "tool_call_parser": "qwen25"}),
    ("/stop_profile", None),
    ("/set_trace_level", None),
    ("/pd_role_switch", {}),
    ("/hicache/storage-backend/clear", None),
    ("/clear_hicache_storage_backend", None),
    ("/add_external_corpus", {}),
    ("/remove_external_corpus", {}),
    ("/send_weights_to_remote_instance", {}),
]


def door_cases() -> list[Case]:
    return [*_other_apis(), *_scores(), *_tokens(), *_other_models(), *_state(), *_posts("control", CONTROLS)]


def _posts(group: str, cases: list[tuple[str, Any]], **options: Any) -> list[Case]:
    return [Case(f"{group} {place}: {path} {str(body)[:60]}", path, body, **options) for place, (path, body) in enumerate(cases)]


def _other_apis() -> list[Case]:
    anthropic = {"model": "default", "max_tokens": 4, "messages": HELLO, "temperature": 0}
    ollama = {"model": "default", "stream": False, "options": {"num_predict": 3, "temperature": 0}}
    vertex = {"instances": [{"text": "hello"}], "parameters": {"sampling_params": SAMPLING}}
    return [
        *variants(
            "anthropic",
            "/v1/messages",
            anthropic,
            ANTHROPIC,
        ),
        *variants(
            "anthropic",
            "/v1/messages/count_tokens",
            {"model": "default", "messages": HELLO},
            {"count": {}, "count nothing": {"messages": []}},
        ),
        *variants(
            "ollama",
            "/api/generate",
            ollama | {"prompt": "hello"},
            {
                "prompt": {},
                "stream": {"stream": True},
                "system": {"system": "be short"},
                "format": {"format": "json"},
                "no prompt": {"prompt": ""},
                "stop": {"options": {"stop": ["a"], "num_predict": 9, "temperature": 0}},
            },
        ),
        *variants(
            "ollama",
            "/api/chat",
            ollama | {"messages": HELLO},
            {"chat": {}, "chat stream": {"stream": True}, "think": {"think": True}, "no messages": {"messages": []}},
        ),
        Case("ollama: tags", "/api/tags", method="GET"),
        Case("ollama: show", "/api/show", {"model": "default"}),
        *variants(
            "vertex",
            "/vertex_generate",
            vertex,
            {
                "one": {},
                "two": {"instances": [{"text": "a b"}, {"text": "c d"}]},
                "none": {"instances": []},
            },
        ),
    ]


def _scores() -> list[Case]:
    score = {"model": "default", "query": "is it", "items": [" good", " bad"], "label_token_ids": [70, 71]}
    question = {"id": "a", "type": "boolean", "question": "is it?"}
    return [
        *variants(
            "score",
            "/v1/score",
            score,
            {
                "plain": {},
                "softmax": {"apply_softmax": True},
                "items first": {"item_first": True},
                "ids": {"query": [5, 6], "items": [[7], [8, 9]]},
                "one item": {"items": " good"},
                "no items": {"items": []},
                "no labels": {"label_token_ids": None},
                "labels each": {"label_token_ids": [[70], [71]]},
                "temperature": {"temperature": 2, "apply_softmax": True},
                "logprobs": {"return_token_logprobs": True},
            },
        ),
        *variants("decisions", "/v1/decisions", {"input": "it is good", "questions": [question]}, {"plain": {}, "none": {"questions": []}}),
        Case("systemone: nothing", "/v1/systemone", {}),
    ]


def _tokens() -> list[Case]:
    return _posts(
        "tokens",
        [
            ("/tokenize", {"model": "default", "prompt": "hello"}),
            ("/v1/tokenize", {"prompt": ["hello", "you"]}),
            ("/tokenize", {"prompt": ""}),
            ("/tokenize", {}),
            ("/tokenize", {"messages": HELLO}),
            ("/detokenize", {"model": "default", "tokens": [70, 71]}),
            ("/v1/detokenize", {"tokens": [[70], [71, 72]]}),
            ("/detokenize", {"tokens": []}),
            ("/detokenize", {}),
        ],
    )


def _other_models() -> list[Case]:
    return _posts(
        "other models",
        [
            ("/encode", {"text": "x"}),
            ("/v1/embeddings", {"model": "default", "input": "x"}),
            ("/v1/embeddings", {"model": "default", "input": ["x", "y"]}),
            ("/v1/rerank", {"query": "a", "documents": ["b"]}),
            ("/rerank", {"query": "a", "documents": ["b"]}),
            ("/classify", {"text": "x"}),
            ("/v1/classify", {"model": "default", "input": "x"}),
            ("/v1/audio/transcriptions", {}),
            ("/v1/images/generations", {"prompt": "x"}),
        ],
    )


def _state() -> list[Case]:
    paths = [
        "/",
        "/ping",
        "/ready",
        "/health",
        "/health_generate",
        "/v1/models",
        "/v1/models/default",
        "/v1/models/other",
        "/model_info",
        "/get_model_info",
        "/server_info",
        "/get_server_info",
        "/get_internal_state",
        "/get_load",
        "/metrics/",
        "/v1/loads",
        "/v1/loads?dp_rank=1",
        "/v1/loads?dp_rank=9",
        "/v1/loads?dp_rank=x",
        *(f"/v1/loads?include={part}" for part in ("core", "memory", "queues", "spec", "disagg", "all", "memory,queues", "bogus")),
        "/v1/loads?format=prometheus",
        "/v1/loads?format=x",
        "/hicache/storage-backend",
        "/is_scaling_elastic_ep",
        "/list_external_corpora",
        "/get_hicache_l3_cache_layout",
        "/nowhere",
        "/flush_cache",
        "/get_weight_version",
        "/weight_version",
        "/list_lora_adapters",
    ]
    return [Case(f"state: {path}", path, method="GET") for path in paths]


def refused_cases() -> list[Case]:
    """Asked last: stock may do what they say."""
    calls = [
        ("/pause_generation", {"mode": "retract"}),
        ("/continue_generation", {}),
        ("/open_session", {"capacity_of_str_len": 5, "session_id": "conformance"}),
        ("/close_session", {"session_id": "conformance"}),
        ("/load_lora_adapter", {"lora_name": "x", "lora_path": "y"}),
        ("/unload_lora_adapter", {"lora_name": "x"}),
    ]
    return _posts("refused", calls, documented=CONTROL)
