"""n > 1: SGLang's run that fills the prefix cache is left out for a sharded prompt, and for no other."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dcp.config import DynCpConfig
from sglang_dcp.upstream.front.request_limits import RequestLimits
from sglang_dcp.upstream.front.requests import send_request, validate_request

POOL = 1024


class Manager:
    """As much of SGLang's TokenizerManager as takes part, in its order: check, send, look the state up, wait, read the last output."""

    def __init__(self, preferred: dict[str, Any] | None = None) -> None:
        self.preferred_sampling_params, self.allow_auto_truncate = preferred, False
        self.rid_to_state: dict[str, Any] = {}
        self.model_config = SimpleNamespace(vocab_size=512)
        self.dyncp_limits = RequestLimits(DynCpConfig().resolve(4), 4, POOL, 16)
        self.sent: list[str] = []

    async def send(self, _manager: Any, tokenized: Any) -> None:
        self.sent.append(tokenized.rid)
        state = self.rid_to_state.pop(tokenized.rid)
        state.out_list.append({"meta_info": {"finish_reason": {"type": "length"}}})
        state.finished = True
        state.event.set()

    async def run(self, obj: Any, rid: str, max_new_tokens: int) -> dict[str, Any]:
        state = SimpleNamespace(obj=obj, out_list=[], finished=False, event=asyncio.Event())
        self.rid_to_state[rid] = state
        tokenized = SimpleNamespace(rid=rid, sampling_params=SimpleNamespace(max_new_tokens=max_new_tokens))
        await send_request(self.send, self, tokenized)
        if rid not in self.sent:
            assert self.rid_to_state[rid] is state, "SGLang looks it up right after it has sent"
        await asyncio.wait_for(state.event.wait(), timeout=5)
        assert state.finished
        return dict(state.out_list[-1])


def generate_input(sampling: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(sampling_params=sampling, return_logprob=False, kv_hints=None, routed_dp_rank=None)


def ask(prompt_tokens: int, sampling: dict[str, Any], outputs: list[int]) -> Manager:
    """Checks a prompt and sends it once per entry of `outputs`, each with that output length."""
    manager = Manager()
    obj = generate_input(sampling)
    validate_request(lambda *_: None, manager, obj, [7] * prompt_tokens)

    async def run() -> None:
        for index, new in enumerate(outputs):
            output = await manager.run(obj, str(index), new)
            assert "finish_reason" in output["meta_info"]
        await asyncio.sleep(0)

    asyncio.run(run())
    assert manager.rid_to_state == {}, "no state stays behind"
    return manager


PINNED = {"custom_params": {"dyncp": {"degree": 2}}}
CASES = [
    (2000, {"n": 2, "max_new_tokens": 8}, [0, 8, 8], ["1", "2"]),
    (100, {"n": 2, "max_new_tokens": 8} | PINNED, [0, 8, 8], ["1", "2"]),
    (100, {"n": 2, "max_new_tokens": 8}, [0, 8, 8], ["0", "1", "2"]),
    (2000, {"n": 3}, [0, 128, 128, 128], ["1", "2", "3"]),
    (2000, {"max_new_tokens": 0}, [0], ["0"]),
    (2000, {"n": 2, "max_new_tokens": 0}, [0, 0, 0], ["0", "1", "2"]),
    (2000, {"n": 1, "max_new_tokens": 8}, [8], ["0"]),
]


@pytest.mark.parametrize(("prompt", "sampling", "outputs", "sent"), CASES)
def test_runs_of_a_prompt(prompt: int, sampling: dict[str, Any], outputs: list[int], sent: list[str]) -> None:
    assert ask(prompt, sampling, outputs).sent == sent


def is_sharded(preferred: dict[str, Any] | None, sampling: dict[str, Any], prompt_tokens: int = 100) -> bool:
    obj = generate_input(sampling)
    validate_request(lambda *_: None, Manager(preferred), obj, [7] * prompt_tokens)
    return bool(obj.dyncp_is_sharded)


def test_a_pin_of_the_servers_preferred_parameters_is_checked_like_a_clients() -> None:
    """SGLang merges --preferred-sampling-params behind the check, and the router places by what it finds there."""
    preferred = {"custom_params": {"dyncp": {"degree": 3}}}
    assert is_sharded(preferred, {}) and not is_sharded(None, {})
    assert not is_sharded(preferred, {"custom_params": {}}), "what a client says comes first"
    for tokens in (10, 3 * POOL + 1):
        with pytest.raises(ValueError, match="3"):
            is_sharded(preferred, {}, tokens)
        with pytest.raises(ValueError, match="3"):
            is_sharded(None, preferred, tokens)


def test_a_prompt_is_cut_where_the_server_may_cut_it() -> None:
    obj = generate_input({"max_new_tokens": 8})
    manager, ids = Manager(), [7] * 100_000
    with pytest.raises(ValueError, match="100000 tokens"):
        validate_request(lambda *_: None, manager, obj, ids)
    manager.allow_auto_truncate = True
    validate_request(lambda *_: None, manager, obj, ids)
    assert 1000 < len(ids) < 100_000 and obj.dyncp_is_sharded
