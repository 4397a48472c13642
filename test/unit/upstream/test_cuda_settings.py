"""What a GPU server completes and refuses, each by its flag's name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dcp.upstream.cuda_settings import (
    complete_attention_backend,
    complete_prefill_graph,
    find_cuda_refusal,
    find_transport_refusal,
)


def graphs(prefill: str) -> SimpleNamespace:
    return SimpleNamespace(prefill=SimpleNamespace(backend=prefill), decode=SimpleNamespace(backend="full"))


WORKING: dict[str, Any] = {
    "attention_backend": "flashinfer",
    "cuda_graph_config": graphs("disabled"),
    "moe_a2a_backend": "none",
    "enable_torch_compile": False,
    "enable_deterministic_inference": False,
}


def refusal(**changes: Any) -> str | None:
    return find_cuda_refusal((WORKING | changes).get)


def test_what_was_run_is_served() -> None:
    assert refusal() is None
    for backend in ("flashmla", "torch_native"):
        assert refusal(attention_backend=backend) is None
        assert refusal(attention_backend=backend, prefill_attention_backend=backend, decode_attention_backend=backend) is None


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"attention_backend": "fa3"}, "--attention-backend fa3"),
        ({"decode_attention_backend": "trtllm_mha"}, "--decode-attention-backend trtllm_mha"),
        ({"prefill_attention_backend": "fa3"}, "--prefill-attention-backend fa3"),
        ({"decode_attention_backend": "flashmla"}, "--decode-attention-backend flashmla"),
        ({"attention_backend": "flashmla", "prefill_attention_backend": "flashinfer"}, "--prefill-attention-backend flashinfer"),
        ({"decode_attention_backend": "torch_native"}, "--decode-attention-backend torch_native"),
        ({"attention_backend": "torch_native", "prefill_attention_backend": "fa3"}, "--prefill-attention-backend fa3"),
        ({"cuda_graph_config": graphs("breakable")}, "--cuda-graph-backend-prefill breakable"),
        ({"moe_a2a_backend": "deepep"}, "--moe-a2a-backend deepep"),
        ({"enable_torch_compile": True}, "--enable-torch-compile True"),
        ({"enable_deterministic_inference": True}, "--enable-deterministic-inference True"),
    ],
)
def test_what_was_not_run_is_refused(changes: dict[str, Any], flag: str) -> None:
    message = refusal(**changes)
    assert message is not None and message.startswith(f"{flag} does not work with --enable-dyncp")


def test_completions_leave_what_the_user_said() -> None:
    assert complete_attention_backend({}.get) == {"attention_backend": "flashinfer"}
    assert complete_attention_backend({"attention_backend": "fa3"}.get) == {}
    assert complete_attention_backend({"attention_backend": "flashmla"}.get) == {}
    assert complete_attention_backend({"decode_attention_backend": "fa3"}.get) == {}
    assert complete_prefill_graph({}.get) == {"disable_prefill_cuda_graph": True}
    assert complete_prefill_graph({"disable_prefill_cuda_graph": True}.get) == {}
    assert complete_prefill_graph({"cuda_graph_backend_prefill": "full"}.get) == {}


@pytest.mark.parametrize(
    ("transport", "device", "there"),
    [
        ("auto", "cpu", True),
        ("gloo", "cpu", True),
        ("nccl", "cpu", False),
        ("auto", "cuda", True),
        ("nccl", "cuda", True),
        ("gloo", "cuda", True),
    ],
)
def test_transports_per_device(transport: str, device: str, there: bool) -> None:
    assert (find_transport_refusal(transport, device) is None) == there


def test_peer_memory_needs_a_gpu() -> None:
    message = find_transport_refusal("peer", "cpu")
    assert message is not None and message.startswith("--dyncp-transport peer is not there on --device cpu")
    assert find_transport_refusal("peer", "cuda") is None
