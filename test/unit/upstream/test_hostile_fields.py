"""Every field of a request with values that nobody means: what passes our checks is a message that SGLang's own types can read.

A value of another type does not fail alone: the process that reads it ends, and with it all instances. Typed messages are the oracle.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import msgspec
import pydantic
import pytest
from sglang.srt.managers import io_struct, tokenizer_manager
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_dcp.config import DynCpConfig
from sglang_dcp.upstream.front.field_kinds import Sizes
from sglang_dcp.upstream.front.request_limits import REFUSED_OPTIONS, RequestLimits, check_options
from sglang_dcp.upstream.front.request_ranges import REQUEST, SAMPLING, check_body, check_prompt
from sglang_dcp.upstream.router.placement_hint import strip_hints

VOCABULARY = 512
LIMITS = RequestLimits(DynCpConfig().resolve(4), 4, 1024, 16)
NUMBERS: list[Any] = [-1, 0, 1, 2**31, 2**63, -(2**63) - 1, 2**70, 0.0, 1.5, -1e308, 1e308]
LISTS: list[Any] = [[], [1], [-1], [0], [[1]], [None], ["x"], [True], [1.5], [2**40], [[[]]], [{}]]
OBJECTS: list[Any] = [{}, {"x": 1}, {"5": "x"}, {"5": None}, {"a": {"b": []}}, {"x": "y"}, {"n": 1}]
HOSTILE: list[Any] = [None, True, False, "", "x", "\x00", "9" * 400, *NUMBERS, *LISTS, *OBJECTS]
ONE: dict[str, Any] = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2}}
BODIES: dict[str, dict[str, Any]] = {
    "one": ONE,
    "scored": ONE | {"return_logprob": True, "return_routed_experts": True, "stream": True},
    "text": {"text": "ab", "sampling_params": {"max_new_tokens": 2}},
    "two": ONE | {"input_ids": [[5, 6], [7]]},
    "batch of one": {"text": ["ab"], "sampling_params": {"max_new_tokens": 2}},
    "samples": ONE | {"sampling_params": {"max_new_tokens": 2, "n": 2}},
}
BODY = pydantic.TypeAdapter(io_struct.GenerateReqInput)


@pytest.fixture(scope="module")
def manager() -> Any:
    return SimpleNamespace(
        preferred_sampling_params=None,
        allow_auto_truncate=False,
        sampling_params_class=SamplingParams,
        tokenized_generate_req_type=io_struct.TokenizedGenerateReqInput,
        tokenizer=SimpleNamespace(encode=lambda text, **_: list(text.encode())),
        model_config=SimpleNamespace(vocab_size=VOCABULARY),
        rid_to_state=defaultdict(lambda: SimpleNamespace(time_stats=SimpleNamespace(set_tokenize_finish_time=lambda: None))),
    )


def messages_of(manager: Any, body: dict[str, Any], *, typed: bool = True) -> list[Any]:
    """What would be sent to the router. ValueError: refused, by us or by SGLang, with HTTP 400.

    typed: /generate has compared the body with its types; /vertex_generate and an Engine do not.
    """
    body = copy.deepcopy(body)
    request = BODY.validate_python(body) if typed else io_struct.GenerateReqInput(**body)
    check_options(request)
    check_body(request, Sizes(VOCABULARY))
    request.normalize_batch_and_arguments()
    messages = []
    for single in [request] if request.is_single else [request[place] for place in range(request.batch_size)]:
        ids = single.input_ids if single.input_ids is not None else [5, 6]
        check_prompt(single, ids, VOCABULARY)
        single.kv_hints = strip_hints(single.kv_hints)
        LIMITS.check(len(ids), single.sampling_params or {}, single.routed_dp_rank)
        messages.append(tokenizer_manager.TokenizerManager._create_tokenized_object(manager, single, single.text, ids))
    return messages


def round_trip(manager: Any, body: dict[str, Any], *, typed: bool = True) -> bool:
    """Whether the body passes. Raises whatever a process that reads it would raise."""
    try:
        messages = messages_of(manager, body, typed=typed)
    except ValueError:
        return False
    for message in messages:
        message.time_stats = None
        assert isinstance(message.rid, str)
        assert io_struct.msgpack_decode(io_struct.msgpack_encode(message)).rid == message.rid
    return True


@pytest.fixture(autouse=True)
def _plain_server(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {f"watermark_{name}": None for name in ("key", "context_window")} | {"enable_watermark": False}
    features |= {"watermark_default_enabled": False, "watermark_enforce_all": False}
    monkeypatch.setattr(tokenizer_manager, "get_disagg", lambda: SimpleNamespace(disaggregation_transfer_backend="none"))
    monkeypatch.setattr(tokenizer_manager, "get_exec", lambda: SimpleNamespace(features=SimpleNamespace(**features)))


@pytest.mark.parametrize("typed", [True, False], ids=["typed", "untyped"])
@pytest.mark.parametrize("name", sorted({*REQUEST, *REFUSED_OPTIONS}))
def test_fields_of_a_request(manager: Any, name: str, typed: bool) -> None:
    """Without types, what is empty counts as not given, as SGLang reads it."""
    for kind, body in BODIES.items():
        for value in HOSTILE if typed else filter(None, HOSTILE):
            try:
                round_trip(manager, body | {name: value}, typed=typed)
            except Exception as error:
                raise AssertionError(f"{kind}: {name} = {json.dumps(value)[:80]} passes, then {error!r}") from error


@pytest.mark.parametrize("name", sorted(SAMPLING))
def test_sampling_parameters(manager: Any, name: str) -> None:
    for value in HOSTILE:
        for others in ({}, {"temperature": 0}):
            body = ONE | {"sampling_params": {"max_new_tokens": 2} | others | {name: value}}
            try:
                round_trip(manager, body)
            except Exception as error:
                raise AssertionError(f"{name} = {json.dumps(value)[:80]} passes, then {error!r}") from error


def test_plain_bodies_pass_and_the_oracle_sees_a_wrong_type(manager: Any) -> None:
    for body in BODIES.values():
        assert round_trip(manager, body)
    (message,) = messages_of(manager, ONE)
    message.time_stats, message.positional_embed_overrides = None, False
    with pytest.raises(msgspec.ValidationError):
        io_struct.msgpack_decode(io_struct.msgpack_encode(message))
