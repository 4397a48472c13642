"""What a GPU server completes and refuses, each by its flag's name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dcp.upstream.attach.cuda_settings import (
    complete_attention_backend,
    complete_prefill_graph,
    find_card_refusal,
    find_cuda_refusal,
    find_kv_type_refusal,
    find_quantised_kv_refusal,
    find_sliced_kv_refusal,
    find_transport_refusal,
    find_untried,
)


def graphs(prefill: str) -> SimpleNamespace:
    return SimpleNamespace(prefill=SimpleNamespace(backend=prefill), decode=SimpleNamespace(backend="full"))


WORKING: dict[str, Any] = {
    "attention_backend": "flashinfer",
    "cuda_graph_config": graphs("disabled"),
    "moe_a2a_backend": "none",
    "moe_dense_tp_size": None,
    "enable_dp_lm_head": False,
    "enable_torch_compile": False,
    "enable_deterministic_inference": False,
}


def refusal(**changes: Any) -> str | None:
    return find_cuda_refusal((WORKING | changes).get)


def test_what_was_run_is_served() -> None:
    assert refusal() is None
    for backend in ("fa3", "flashmla", "torch_native"):
        assert refusal(attention_backend=backend) is None
        assert refusal(attention_backend=backend, prefill_attention_backend=backend, decode_attention_backend=backend) is None


def test_sglangs_own_default_stands_where_it_was_run() -> None:
    """Turning dynamic context parallelism on changes no kernel of a step in which nobody is sharded."""
    assert complete_attention_backend({}.get, latent=False) == {}
    assert complete_attention_backend({"kv_cache_dtype": "fp8_e4m3"}.get, latent=False) == {}
    assert complete_attention_backend({}.get, latent=True) == {"attention_backend": "flashinfer"}
    assert complete_attention_backend({"kv_cache_dtype": "fp8_e4m3"}.get, latent=True) == {"attention_backend": "flashmla"}
    message = find_cuda_refusal((WORKING | {"attention_backend": "fa3"}).get, latent=True)
    assert message is not None and message.startswith("--attention-backend fa3 does not work with --enable-dyncp for a model with latent")
    assert find_cuda_refusal(WORKING.get, latent=True) is None


def test_slices_run_flashinfer_where_nobody_names_a_backend() -> None:
    """Nothing else was run under them; one that is named is judged with the other settings (test_settings.py)."""
    sliced: dict[str, Any] = {"tp_size": 4, "attn_dp_size": 2}
    assert complete_attention_backend(sliced.get, latent=False) == {"attention_backend": "flashinfer"}
    assert complete_attention_backend((sliced | {"attention_backend": "fa3"}).get, latent=False) == {}
    assert complete_attention_backend((sliced | {"attn_dp_size": 4}).get, latent=False) == {}
    assert str(find_untried((WORKING | sliced).get)).startswith("attention TP 2: what ran are two slices of each of two instances")
    assert find_untried((WORKING | sliced | {"attn_dp_size": 4}).get) is None


def test_a_checkpoint_of_quantised_kv_is_refused_for_slices() -> None:
    message = find_sliced_kv_refusal(torch.float8_e4m3fn, 2)
    assert str(message).startswith("a KV pool of float8_e4m3fn (by --kv-cache-dtype, or by auto and this checkpoint) does not work with")
    assert str(message).endswith("attention TP 2: it was not run with it on a GPU yet; give --kv-cache-dtype bfloat16")
    assert find_sliced_kv_refusal(torch.float8_e4m3fn, 1) is None and find_sliced_kv_refusal(torch.bfloat16, 2) is None


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"attention_backend": "triton"}, "--attention-backend triton"),
        ({"decode_attention_backend": "trtllm_mha"}, "--decode-attention-backend trtllm_mha"),
        ({"prefill_attention_backend": "fa3"}, "--prefill-attention-backend fa3"),
        ({"decode_attention_backend": "flashmla"}, "--decode-attention-backend flashmla"),
        ({"attention_backend": "flashmla", "prefill_attention_backend": "flashinfer"}, "--prefill-attention-backend flashinfer"),
        ({"decode_attention_backend": "torch_native"}, "--decode-attention-backend torch_native"),
        ({"attention_backend": "torch_native", "prefill_attention_backend": "fa3"}, "--prefill-attention-backend fa3"),
        ({"cuda_graph_config": graphs("breakable")}, "--cuda-graph-backend-prefill breakable"),
        ({"moe_a2a_backend": "deepep_v2"}, "--moe-a2a-backend deepep_v2"),
        ({"moe_a2a_backend": "mooncake"}, "--moe-a2a-backend mooncake"),
        ({"enable_torch_compile": True}, "--enable-torch-compile True"),
        ({"enable_deterministic_inference": True}, "--enable-deterministic-inference True"),
        ({"disable_cuda_graph_padding": True}, "--disable-cuda-graph-padding True"),
        ({"debug_cuda_graph": True}, "--debug-cuda-graph True"),
    ],
)
def test_what_was_not_run_is_refused(changes: dict[str, Any], flag: str) -> None:
    message = refusal(**changes)
    assert message is not None and message.startswith(f"{flag} does not work with --enable-dyncp")


def test_graphs_that_replay_python_are_refused_where_sharded_steps_have_some() -> None:
    """Such a replay enters our backend outside a capture, where it takes the step for one of stock's (test_sharded_step.py)."""
    debugged = WORKING | {"debug_cuda_graph": True}
    for transport in ("auto", "peer"):
        assert f"and --dyncp-transport {transport}: a replay runs" in str(find_cuda_refusal(debugged.get, transport=transport))
    for transport in ("nccl", "gloo"):
        assert find_cuda_refusal(debugged.get, transport=transport) is None


@pytest.mark.parametrize("dense", [None, 1, 2])
@pytest.mark.parametrize("lm_head", [False, True])
def test_deepep_is_served_whether_or_not_sglang_gathers_tokens(dense: int | None, lm_head: bool) -> None:
    """Instances that choose their graphs by their own batches: test_own_batch_graphs."""
    changes = {"moe_a2a_backend": "deepep", "moe_dense_tp_size": dense, "enable_dp_lm_head": lm_head}
    assert refusal(**changes) is None
    assert (find_untried((WORKING | changes).get) is not None) == (dense == 1 and lm_head)
    assert find_untried((WORKING | changes | {"moe_a2a_backend": "none"}).get) is None


def test_stock_gathers_where_the_docs_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own rule (which instances' batches decide a decode graph's size) behind test_own_batch_graphs."""
    from sglang.srt.utils import common

    monkeypatch.setattr(common, "get_exec", lambda: SimpleNamespace(moe=SimpleNamespace(elastic_ep_backend=None)))
    for dense, lm_head in ((None, False), (None, True), (1, False), (1, True)):
        parallel = SimpleNamespace(attn_dp_enabled=True, num_dp_ranks=2, tp_size=2, moe_dense_tp_size=dense, enable_dp_lm_head=lm_head)
        monkeypatch.setattr(common, "get_parallel", lambda parallel=parallel: parallel)
        assert common.require_mlp_tp_gather(moe_a2a_backend="deepep") == ((dense, lm_head) != (1, True))
        assert common.require_mlp_tp_gather(moe_a2a_backend="none")


def test_single_batch_overlap_is_refused_for_what_sglang_itself_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on no Hopper GPU: while that is so, the reason in settings.REFUSALS holds."""
    from sglang.srt.layers.moe import utils

    moe = SimpleNamespace(moe_a2a_backend="deepep", moe_runner_backend="deep_gemm", deepep_mode="auto", deepep_config=None)
    overlap = SimpleNamespace(enable_two_batch_overlap=False, enable_single_batch_overlap=True)
    monkeypatch.setattr(utils, "get_exec", lambda: SimpleNamespace(moe=moe, overlap=overlap))
    monkeypatch.setattr(utils, "get_spec", lambda: SimpleNamespace(speculative_moe_runner_backend=None, speculative_moe_a2a_backend=None))
    monkeypatch.setattr(utils, "get_flags", lambda: SimpleNamespace(moe=SimpleNamespace()))
    monkeypatch.setattr(utils, "is_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(ValueError, match="not supported on SM90"):
        utils.initialize_moe_config()


def test_completions_leave_what_the_user_said() -> None:
    for given in ({"attention_backend": "fa3"}, {"attention_backend": "flashmla"}, {"decode_attention_backend": "fa3"}):
        assert complete_attention_backend(given.get, latent=True) == {}
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


@pytest.mark.parametrize("sm", [80, 86, 89, 100, 120])
def test_other_cards_than_hopper_are_refused_by_their_capability(sm: int) -> None:
    assert find_card_refusal(90) is None
    assert str(find_card_refusal(sm)).startswith(f"a GPU of compute capability {sm // 10}.{sm % 10} does not work with --enable-dyncp")


@pytest.mark.parametrize(
    ("name", "backend", "latent", "why"),
    [
        ("float8_e5m2", "flashinfer", False, ": of quantised types, float8_e4m3fn alone is exchanged"),
        ("uint8", "flashmla", True, ": of quantised types, float8_e4m3fn alone is exchanged"),
        ("float8_e4m3fn", "torch_native", False, " and --attention-backend torch_native: this model is served with fa3 or flashinfer"),
        ("float8_e4m3fn", "flashinfer", True, " and --attention-backend flashinfer: latent attention (MLA) is served with flashmla"),
    ],
)
def test_a_quantised_pool_that_is_not_served_is_refused_by_name(name: str, backend: str, latent: bool, why: str) -> None:
    """A checkpoint may ask for it, which no flag shows."""
    message = str(find_kv_type_refusal(getattr(torch, name), backend, latent=latent))
    assert message.startswith(f"a KV pool of {name} (by --kv-cache-dtype, or by auto and this checkpoint) does not work with")
    assert f"--enable-dyncp{why}" in message
    assert message.endswith("give --kv-cache-dtype bfloat16")
    for served in ("bfloat16", "float16", "float32"):
        assert find_kv_type_refusal(getattr(torch, served), backend, latent=latent) is None
    for backend, latent in (("flashinfer", False), ("fa3", False), ("flashmla", True)):
        assert find_kv_type_refusal(torch.float8_e4m3fn, backend, latent=latent) is None


def test_quantised_latents_of_slices_are_refused_as_slices() -> None:
    """Not for a backend that nobody named."""
    asked: dict[str, Any] = {"tp_size": 4, "attn_dp_size": 2, "kv_cache_dtype": "fp8_e4m3", "device": "cuda"}
    completed = asked | complete_attention_backend(asked.get, latent=True)
    assert completed["attention_backend"] == "flashinfer" and find_quantised_kv_refusal(completed.get, latent=True) is None


def test_quantised_kv_is_for_a_gpu_and_its_backends() -> None:
    asked = {"kv_cache_dtype": "fp8_e4m3", "device": "cuda"}
    assert find_quantised_kv_refusal((asked | {"attention_backend": "flashinfer"}).get) is None
    assert find_quantised_kv_refusal({"kv_cache_dtype": "auto", "device": "cpu"}.get) is None
    message = str(find_quantised_kv_refusal((asked | {"device": "cpu"}).get))
    assert message == "--kv-cache-dtype fp8_e4m3 does not work with --enable-dyncp on --device cpu: it is served on a GPU alone"
    message = str(find_quantised_kv_refusal((asked | {"decode_attention_backend": "flashmla"}).get))
    assert "--attention-backend flashmla: this model is served with fa3 or flashinfer" in message
    assert find_quantised_kv_refusal((asked | {"attention_backend": "flashmla"}).get, latent=True) is None
    message = str(find_quantised_kv_refusal((asked | {"attention_backend": "flashinfer"}).get, latent=True))
    assert "--attention-backend flashinfer: latent attention (MLA) is served with flashmla" in message
