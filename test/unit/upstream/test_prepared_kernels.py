"""What eager sharded steps run on a GPU is compiled when the server starts, for the layers that the model has."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dcp.config import DynCpConfig
from sglang_dcp.dataflow.attention.paged_attention import AttentionShape, PagedPartialAttention
from sglang_dcp.dataflow.attention.partial_attention import torch_partial_attention
from sglang_dcp.upstream.attach import scheduler as attach_scheduler
from sglang_dcp.upstream.layers.graphs import GraphError, attention_shape, attention_shapes
from sglang_dcp.upstream.layers.step_path import prepare_kernels
from sglang_dcp.upstream.pool.kv_pool import LedgerAllocator

CUDA, FP8 = torch.device("cuda"), torch.float8_e4m3fn
FULL = AttentionShape(8, 2, 128, 128, torch.bfloat16, 0.1, latent=False)
Prepared = list[tuple[str, Any]]


class RadixAttention(torch.nn.Module):
    """Stand-in: SGLang's cannot be imported without its platform."""

    def __init__(self, heads: int = 8, kv_heads: int = 2, qk_dim: int = 128, v_dim: int = 128, window: int = -1) -> None:
        super().__init__()
        self.tp_q_head_num, self.tp_k_head_num, self.qk_head_dim, self.v_head_dim = heads, kv_heads, qk_dim, v_dim
        self.sliding_window_size, self.scaling = window, 0.1


def runner_of(*layers: RadixAttention, kv_type: torch.dtype = torch.bfloat16, mla: bool = False) -> Any:
    model = torch.nn.ModuleList(layers)
    return SimpleNamespace(model=model, dtype=torch.bfloat16, kv_cache_dtype=kv_type, use_mla_backend=mla)


MLA_LAYERS = RadixAttention(16, 1, 576, 512), RadixAttention(16, 16, 192, 128)
"""The absorbed form of a layer, and the other one."""
UNLIKE_HEADS = RadixAttention(), RadixAttention(heads=12, window=512), RadixAttention(), RadixAttention(heads=12, window=512)
"""As of Step-3.5."""


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """What was prepared, in order; nothing is compiled."""
    seen: Prepared = []
    monkeypatch.setattr("sglang_dcp.dataflow.merge_kernel.prepare", lambda heads, dim, device: seen.append(("merge", (heads, dim))))
    monkeypatch.setattr(PagedPartialAttention, "prepare", lambda self, shape, window, device: seen.append(("attention", (shape, window))))
    return seen


def flashinfer_attention() -> PagedPartialAttention:
    from sglang_dcp.dataflow.attention.flashinfer_step import flashinfer_kernel

    return PagedPartialAttention(16, flashinfer_kernel)


def test_layers_that_are_alike_share_their_kernels(prepared: Prepared) -> None:
    prepare_kernels(flashinfer_attention(), runner_of(RadixAttention(), RadixAttention()), CUDA)
    assert prepared == [("merge", (8, 128)), ("attention", (FULL, None))]


def test_every_window_has_its_own(prepared: Prepared) -> None:
    """Such layers may have other heads, which a merge is compiled for too. Decode graphs take the most of them for all."""
    runner = runner_of(*UNLIKE_HEADS)
    prepare_kernels(flashinfer_attention(), runner, CUDA)
    more_heads = dataclasses.replace(FULL, num_heads=12)
    attention = [("attention", (FULL, None)), ("attention", (more_heads, 512))]
    assert prepared == [("merge", (8, 128)), ("merge", (12, 128)), *attention]
    assert attention_shape(runner) == more_heads


def test_latent_attention_is_prepared_in_its_absorbed_form(prepared: Prepared) -> None:
    prepare_kernels(flashinfer_attention(), runner_of(*MLA_LAYERS, kv_type=FP8, mla=True), CUDA)
    shape = AttentionShape(16, 1, 576, 512, torch.bfloat16, 0.1, latent=True, quantised=FP8)
    assert prepared == [("merge", (16, 512)), ("attention", (shape, None))]


def test_layers_of_several_shapes_are_left_to_their_steps(prepared: Prepared, caplog: pytest.LogCaptureFixture) -> None:
    runner = runner_of(RadixAttention(), RadixAttention(qk_dim=64, v_dim=64), RadixAttention(window=512))
    with caplog.at_level("INFO"):
        prepare_kernels(flashinfer_attention(), runner, CUDA)
    assert [what for what, _ in prepared] == ["merge", "merge", "attention"] and prepared[-1] == ("attention", (FULL, 512))
    assert "layers of window None, which have 2 shapes" in caplog.text
    with pytest.raises(GraphError, match="attention layers of 2 shapes"):
        attention_shape(runner)


def test_plain_torch_has_nothing_to_compile(prepared: Prepared) -> None:
    prepare_kernels(torch_partial_attention, runner_of(RadixAttention()), CUDA)
    assert prepared == [("merge", (8, 128))]


def test_nothing_is_prepared_on_a_cpu(prepared: Prepared) -> None:
    prepare_kernels(torch_partial_attention, runner_of(RadixAttention()), torch.device("cpu"))
    assert prepared == []


def test_a_model_of_another_type_is_refused_by_name() -> None:
    runner = runner_of(RadixAttention())
    runner.dtype = runner.kv_cache_dtype = torch.float16
    (shape,) = attention_shapes(runner)[None]
    with pytest.raises(ValueError, match="serves bfloat16, this model has torch.float16"):
        flashinfer_attention().prepare(shape, None, torch.device("cpu"))


@pytest.mark.parametrize(
    ("config", "order"),
    [
        (DynCpConfig(policy="dual-balance"), ["kernels", "agreement", "group"]),
        (DynCpConfig(policy="local"), ["agreement", "group"]),
        (DynCpConfig(policy="local", cache_fraction=0.5), ["kernels", "agreement", "group"]),
    ],
    ids=["sharded", "whole at home", "whole, perhaps elsewhere"],
)
def test_a_server_prepares_ahead_of_the_first_exchange(monkeypatch: pytest.MonkeyPatch, config: DynCpConfig, order: list[str]) -> None:
    """Where rows may lie elsewhere. Ahead of groups of ours, whose peers may not be minutes late."""
    from sglang.srt import runtime_context

    seen: list[str] = []
    pool: Any = object.__new__(LedgerAllocator)
    pool.page_size, pool.num_pages = 16, 8
    monkeypatch.setattr(pool, "bind", lambda *bound: None)
    parallel = SimpleNamespace(num_dp_ranks=2, attn_tp_size=1, tp_rank=0, tp_group=SimpleNamespace(cpu_group=None))
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: parallel)
    for name, what in (("prepare_kernels", "kernels"), ("check_agreement", "agreement"), ("create_gloo_group", "group")):
        monkeypatch.setattr(attach_scheduler, name, lambda *given, what=what: seen.append(what))
    monkeypatch.setattr(attach_scheduler, "choose_transport", lambda *given: None)
    runner = runner_of()
    runner.device = "cpu"
    scheduler = SimpleNamespace(
        token_to_kv_pool_allocator=pool, tp_worker=SimpleNamespace(model_runner=runner), tree_cache=None, server_args=None
    )
    runtime = attach_scheduler.build_runtime(scheduler, config, None)
    assert runtime.partial_attention is torch_partial_attention and seen == order
