"""How a step that has sharded rows is told from one that has none, and what SGLang may do in either."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_dcp.dataflow.attention.partial_attention import torch_partial_attention
from sglang_dcp.dataflow.contracts import NO_SCALES, KVScales
from sglang_dcp.dataflow.step_mode import STOCK, Eager, Graph, GraphStep
from sglang_dcp.ledger.counters import LedgerCounters
from sglang_dcp.policy.split_limits import Layout, SplitLimits
from sglang_dcp.upstream.layers import attention_backend, backends, graphs, mla_form, step_path
from sglang_dcp.upstream.step import sync as step_sync
from sglang_dcp.upstream.step.attached import attach
from sglang_dcp.upstream.step.driver import StepDriver
from sglang_dcp.upstream.step.handlers import after_forward, after_gather
from sglang_dcp.upstream.step.runtime import Runtime

STOCK_OUTPUT = object()
LIMITS = SplitLimits(8, 2, 8, Layout(2, 2))


class Stock:
    """What our backend class needs of a stock backend."""

    forward_metadata: Any = "old"
    token_to_kv_pool = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.forward_metadata = "stock's"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return STOCK_OUTPUT


@pytest.fixture
def bound() -> Iterator[Any]:
    """The runtime of this process; `mode` says whether the step is sharded."""
    found = Runtime(None, None, SimpleNamespace(rank=1, step=7, ids=None, group=range(2), limits=LIMITS), None, None, None)  # type: ignore[arg-type]
    StepDriver(found)
    attach(found)
    yield found
    attach(None)


def test_stock_runs_where_no_row_is_sharded(bound: Any) -> None:
    backend = attention_backend.make_backend_class(Stock)()
    backend.init_forward_metadata(None)
    assert backend.forward_metadata == "stock's"
    assert backend.forward(None, None, None, None, None) is STOCK_OUTPUT
    assert attention_backend.fused_kv_write(lambda batch: True, None) is True


def test_a_sharded_step_keeps_stock_out(bound: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bound.mode = Eager(None, [])
    backend = attention_backend.make_backend_class(Stock)()
    backend.init_forward_metadata(None)
    assert backend.forward_metadata is None
    seen: list[Any] = []
    monkeypatch.setattr(attention_backend, "forward_sharded", lambda *args, **_: seen.append(args))
    q, k, v = torch.zeros(1, 4), torch.zeros(1, 2), torch.zeros(1, 2)
    backend.forward(q, k, v, "layer", "batch")
    assert seen[0][1:] == (None, q, k, v, "layer")
    assert attention_backend.fused_kv_write(lambda batch: True, None) is False


def test_a_layer_of_a_graph_step_is_stock_s_outside_a_capture(bound: Any) -> None:
    """A graph's replay enters no backend. One that runs Python (--debug-cuda-graph) would end up here, and is refused."""
    bound.mode = Graph(4, None)  # type: ignore[arg-type]
    assert attention_backend.make_backend_class(Stock)().forward(None, None, None, None, None) is STOCK_OUTPUT


def test_a_process_without_an_instance_is_stock() -> None:
    attach(None)
    assert not attention_backend.step_is_sharded()
    assert attention_backend.make_backend_class(Stock)().forward(None, None, None, None, None) is STOCK_OUTPUT


class CapturingStock(Stock):
    """What our backend class needs of a stock backend while graphs are captured."""

    token_to_kv_pool = SimpleNamespace(size=128, page_size=64)  # type: ignore[assignment]

    def __init__(self) -> None:
        self.stock_calls: list[str] = []

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.stock_calls.append("state")

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        self.stock_calls.append("out_graph")

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        self.stock_calls.append("in_graph")


@pytest.mark.parametrize("kernel", ["flashinfer", "fa3", "flashmla"])
def test_a_captured_step_begins_with_what_its_layers_share(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Stock's variant is stock's; what the layers of ours share is recorded once, ahead of them."""
    seen: list[Any] = []
    attention = SimpleNamespace(prepare=lambda *rows: seen.append(("prepare", *rows)), begin=lambda *rows: seen.append(("begin", *rows)))
    engine = graphs.GraphEngine((4,), [], 0, Layout(1, 1), None)
    engine.attention, engine._own_slots = attention, torch.zeros(8, dtype=torch.int64)
    monkeypatch.setattr(engine, "build", lambda runner, max_bs, *, kernel: seen.append(("build", runner, max_bs, kernel)))
    monkeypatch.setattr(attention_backend, "process_graphs", lambda: engine)
    backend: Any = attention_backend.make_backend_class(CapturingStock, kernel=kernel)()
    backend.dyncp_runner = runner = SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token="token table"))
    backend.init_cuda_graph_state(8, 8)
    batch = SimpleNamespace(batch_size=3, out_cache_loc=torch.tensor([70, 191, 192]))
    for guest_rows in (0, 4):
        monkeypatch.setattr(attention_backend, "captured_guest_rows", lambda guest_rows=guest_rows: guest_rows)
        backend.init_forward_metadata_out_graph(batch, in_capture=True)
        backend.init_forward_metadata_in_graph(batch)
    assert backend.stock_calls == ["state", "out_graph", "in_graph"]
    assert seen == [("build", runner, 8, kernel), ("prepare", 3, 4), ("begin", 3, 4, "token table")]
    assert engine.own_slots(3).tolist() == [70, 191, 0], "K/V that travels goes to the slot of padding here"


def test_flashmla_is_for_latent_attention() -> None:
    with pytest.raises(ValueError, match="--attention-backend flashmla serves models with latent attention"):
        backends.create_flashmla(SimpleNamespace(use_mla_backend=False, kv_cache_dtype=torch.bfloat16))


def test_fa3_is_for_models_without_latent_attention() -> None:
    with pytest.raises(ValueError, match=r"--attention-backend fa3 .* no latent attention \(MLA\); use flashinfer or flashmla"):
        backends.create_fa3(SimpleNamespace(use_mla_backend=True, kv_cache_dtype=torch.bfloat16))


@pytest.mark.parametrize("create", ["create_torch_native", "create_flashinfer", "create_fa3", "create_flashmla"])
def test_every_backend_refuses_quantised_pools_that_are_not_exchanged(create: str) -> None:
    """Ahead of anything else: a checkpoint decides it, so no flag could be refused at start."""
    wrong = torch.float8_e4m3fn if create == "create_flashinfer" else torch.float8_e5m2  # the one casts pools of latents, whole
    for latent, dtype in ((False, torch.float8_e5m2), (True, wrong)):
        with pytest.raises(ValueError, match=f"a KV pool of {str(dtype)[6:]}"):
            getattr(backends, create)(SimpleNamespace(kv_cache_dtype=dtype, use_mla_backend=latent))


def test_scaled_latents_are_refused_by_their_layer() -> None:
    """SGLang casts them without a scale and reads them with one."""
    layers = [SimpleNamespace(layer_id=0, k_scale_float=1.0), SimpleNamespace(layer_id=1, k_scale_float=0.5), object()]
    runner = SimpleNamespace(kv_cache_dtype=torch.float8_e4m3fn, model=SimpleNamespace(modules=lambda: layers))
    with pytest.raises(ValueError, match=r"attention layer 1 has k_scale 0.5, and latent attention \(MLA\) is served with 1"):
        backends.check_latent_scales(runner)
    layers[1].k_scale_float = None
    backends.check_latent_scales(runner)
    layers[1].k_scale_float, runner.kv_cache_dtype = 0.5, torch.bfloat16
    backends.check_latent_scales(runner)


def test_slices_have_no_quantised_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt import runtime_context

    runner, parallel = SimpleNamespace(kv_cache_dtype=torch.float8_e4m3fn, use_mla_backend=False), SimpleNamespace(attn_tp_size=1)
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: parallel)
    backends.check_kv_type(runner, "flashinfer")
    parallel.attn_tp_size = 2
    with pytest.raises(ValueError, match="a KV pool of float8_e4m3fn .* attention TP 2"):
        backends.check_kv_type(runner, "flashinfer")


@pytest.mark.parametrize("name", ["flashinfer", "flashmla"])
def test_latent_attention_is_absorbed_where_rows_are_sharded(bound: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    handlers = pytest.importorskip("sglang.srt.models.deepseek_common.attention_backend_handler").AttentionBackendRegistry
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    monkeypatch.setattr(handlers, "_handlers", dict(handlers._handlers))
    handlers.register(name, lambda attention, forward_batch: "stock's")
    mla_form.register_mla_form()
    assert handlers.get_handler(name)(None, None) == "stock's"
    bound.mode = Eager(None, [])
    assert handlers.get_handler(name)(None, None) is AttnForwardMethod.MLA


def test_rotary_parts_are_joined_behind_the_latent() -> None:
    """FlashInfer's MLA gets q [T, heads, latent] and q_rope [T, heads, rotary] apart."""
    q, k = torch.randn(3, 4, 8), torch.randn(3, 1, 8)
    q_rope, k_rope = torch.randn(3, 4, 2), torch.randn(3, 1, 2)
    joined_q, joined_k, v = attention_backend.with_rotary_part(q, k, k, q_rope=q_rope, k_rope=k_rope)
    assert joined_q.equal(torch.cat([q, q_rope], -1)) and joined_k.equal(torch.cat([k, k_rope], -1)) and v is k
    flat_q, _, _ = attention_backend.with_rotary_part(q.flatten(1), k, k, q_rope=q_rope.flatten(1), k_rope=k_rope)
    assert flat_q.equal(joined_q)
    assert attention_backend.with_rotary_part(q, k, k)[0] is q


def test_graph_and_eager_steps_are_counted(bound: Any) -> None:
    for ran_as_graph in (True, True, False):
        after_forward(SimpleNamespace(can_run_cuda_graph=ran_as_graph), None)
    assert (bound.counters.graph_steps, bound.counters.eager_steps) == (2, 1)


def test_auto_is_gloo_on_a_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(step_path, "create_gloo_group", lambda timeout, groups: None)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with caplog.at_level("INFO"):
        chosen = step_path.choose_transport("auto", cpu, [range(1)], 1.0, None)
    assert type(chosen).__name__ == "GlooTransport" and "auto is gloo: the device is a CPU" in caplog.text
    assert type(step_path.choose_transport("gloo", cuda, [range(1)], 1.0, None)).__name__ == "HostStagedTransport"
    monkeypatch.setattr("sglang_dcp.dataflow.transport.nccl.create_nccl_group", lambda timeout, groups: None)
    assert type(step_path.choose_transport("auto", cuda, [range(1)], 1.0, None)).__name__ == "NcclTransport"
    with pytest.raises(graphs.GraphError, match="--dyncp-transport peer"):
        step_path.choose_transport("peer", cuda, [range(1)], 1.0, None)


def test_plain_torch_on_a_gpu_serves_torch_native_and_no_mla() -> None:
    def chosen(device: str, backend: str, mla: bool = False) -> Any:
        runner = SimpleNamespace(decode_attention_backend_str=backend, use_mla_backend=mla)
        return step_path.choose_partial_attention(torch.device(device), 16, runner)

    assert chosen("cpu", "torch_native", mla=True) is torch_partial_attention
    assert chosen("cuda", "torch_native") is torch_partial_attention
    assert type(chosen("cuda", "flashinfer", mla=True)).__name__ == "PagedPartialAttention"
    with pytest.raises(ValueError, match="torch_native with --enable-dyncp serves no MLA model on a GPU"):
        chosen("cuda", "torch_native", mla=True)


def test_torch_native_can_pad_a_batch_on_a_gpu() -> None:
    pools = {"req_to_token_pool": None, "token_to_kv_pool": None, "kv_cache_dtype": torch.float32}
    runner = SimpleNamespace(device="cpu", use_mla_backend=False, **pools)
    assert backends.create_torch_native(runner).get_cuda_graph_seq_len_fill_value() == 1


def test_a_graph_step_never_runs_eagerly(bound: Any) -> None:
    """All instances replay it or none: falling back on one would leave the others waiting in the exchange."""
    bound.mode = Graph(16, GraphStep(7, [], []))
    with pytest.raises(graphs.GraphError, match="rank 1, step 7: .* 16 guest rows"):
        attention_backend.make_backend_class(Stock)().init_forward_metadata(None)


NODES = [((), True, [3, 0, 0, 0]), ((0, 1), False, [3, 1, 0, 0]), ((2, 3), False, [3, 0, 1, 1])]
"""Ranks whose group has a sharded row, whether SGLang may replay a graph, tokens of every rank as SGLang sees them."""


@pytest.mark.parametrize("num_tokens", [0, 3])
@pytest.mark.parametrize(("busy", "graph", "counts"), NODES)
def test_a_node_without_sharded_rows_runs_stock_beside_the_others(
    bound: Any, monkeypatch: pytest.MonkeyPatch, busy: tuple[int, ...], graph: bool, counts: list[int], num_tokens: int
) -> None:
    """It takes no part in an exchange, so an idle instance of it needs no dummy token; all instances count every other's alike."""
    told = {"read_columns": lambda columns: 0, "finish_step": lambda words, anybody_runs: None}
    bound.participant = SimpleNamespace(counters=LedgerCounters(), num_sharded_rows=len(busy), busy_ranks=frozenset(busy), rank=1, **told)
    monkeypatch.setattr(step_sync, "home_rows", lambda found: ["rows"])
    flags = {"can_run_decode_cuda_graph": True, "can_run_prefill_cuda_graph": True}
    info = SimpleNamespace(
        tp0_info_cpu=torch.zeros(4, 19, dtype=torch.int64), global_num_tokens=[3, 0, 0, 0], num_tokens=num_tokens, **flags
    )
    after_gather(None, info)
    assert info.can_run_decode_cuda_graph is info.can_run_prefill_cuda_graph is graph
    assert info.global_num_tokens == counts and all(type(count) is int for count in info.global_num_tokens)
    assert info.num_tokens == (max(1, num_tokens) if 1 in busy else num_tokens)
    assert (bound.mode is STOCK) == (1 not in busy)


def test_a_sharded_row_anywhere_makes_the_step_eager_everywhere(bound: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags that SGLang's graph runners ask are cleared from what all instances know, with an idle instance made to take part."""
    for num_sharded, graph in ((0, True), (1, False)):
        bound.participant = SimpleNamespace(
            counters=LedgerCounters(),
            rank=1,
            busy_ranks=frozenset((0, 1)),
            num_sharded_rows=num_sharded,
            read_columns=lambda columns: 0,
            finish_step=lambda words, anybody_runs: None,
        )
        monkeypatch.setattr(step_sync, "home_rows", lambda found: ["rows"])
        info = SimpleNamespace(
            tp0_info_cpu=torch.zeros(2, 19, dtype=torch.int64),
            global_num_tokens=[3, 0],
            num_tokens=0,
            can_run_decode_cuda_graph=True,
            can_run_prefill_cuda_graph=True,
        )
        after_gather(None, info)
        assert info.can_run_decode_cuda_graph is info.can_run_prefill_cuda_graph is graph
        assert info.global_num_tokens == ([3, 0] if graph else [3, 1])
        assert bound.mode is STOCK if graph else bound.mode.home_rows == ["rows"] and bound.mode.plans == {}


def test_pages_of_local_requests_come_in_one_read() -> None:
    """Page numbers per request, cut to its own length; the table holds token ids."""
    page_size = 4
    table = torch.zeros(3, 32, dtype=torch.int32)
    pages = {0: [5, 2, 7], 2: [9]}
    for line, numbers in pages.items():
        table[line, : len(numbers) * page_size] = torch.from_numpy(
            (np.array(numbers)[:, None] * page_size + np.arange(page_size)).ravel()
        ).int()
    found: Any = SimpleNamespace(
        participant=SimpleNamespace(page_size=page_size),
        scheduler=SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=table)),
    )
    requests = [(SimpleNamespace(kv=SimpleNamespace(req_pool_idx=line)), length) for line, length in ((0, 9), (2, 4))]
    assert [numbers.tolist() for numbers in step_sync.read_local_pages(found, requests)] == [[5, 2, 7], [9]]
    assert list(step_sync.read_local_pages(found, [])) == []


@pytest.mark.parametrize("latent", [False, True])
def test_new_kv_of_a_layer_is_contiguous(latent: bool) -> None:
    """Models hand over views of a joined projection; MLA's values are a view of its keys."""
    layer: Any = SimpleNamespace(tp_k_head_num=1 if latent else 2, qk_head_dim=6 if latent else 4, v_head_dim=4)
    written: list[Any] = []
    pool: Any = SimpleNamespace(dtype=torch.float32, set_kv_buffer=lambda *args: written.append(args))
    cache = attention_backend.PoolLayer(pool, layer, latent=latent)
    joined = torch.randn(3, 20)
    new_kv = cache.new_kv(joined[:, 2:8].unflatten(1, (1, 6)) if latent else joined[:, 2:10], joined[:, 10:18])
    assert new_kv.keys.is_contiguous() and new_kv.keys.flatten(1).equal(joined[:, 2:8] if latent else joined[:, 2:10])
    assert new_kv.values.equal(new_kv.keys[..., :4]) if latent else new_kv.values.flatten(1).equal(joined[:, 10:18])
    assert len(new_kv.travelling) == (1 if latent else 2)
    slots = torch.tensor([0, 5, 6])
    cache.write(slots, new_kv)
    assert written[0][0] is layer and written[0][2].equal(new_kv.keys) and written[0][3].equal(new_kv.values)


def test_a_quantised_layer_stores_bytes_of_its_own() -> None:
    """SGLang's pool divides what it is handed and casts it; the chunk of the same step attends these keys."""
    layer: Any = SimpleNamespace(tp_k_head_num=2, qk_head_dim=4, v_head_dim=4, k_scale_float=0.5, v_scale_float=2.0)
    written: list[Any] = []
    pool: Any = SimpleNamespace(dtype=torch.float8_e4m3fn, set_kv_buffer=lambda *args: written.append(args))
    cache = attention_backend.PoolLayer(pool, layer, latent=False)
    keys, values = torch.randn(3, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    before = keys.clone()
    new_kv = cache.new_kv(keys, values)
    cache.write(torch.tensor([1, 2, 3]), new_kv.stored)
    assert keys.equal(before) and new_kv.keys.flatten(1).equal(keys)
    for wanted, stored in zip(((keys / 0.5), (values / 2.0)), written[0][2:4], strict=True):
        assert stored.dtype == torch.float8_e4m3fn and stored.flatten(1).float().equal(wanted.to(stored.dtype).float())
    read_back = attention_backend.PoolLayer(pool, layer, latent=False, attend_stored=True).new_kv(keys, values)
    assert read_back.keys.equal(read_back.stored.keys.to(keys.dtype) * 0.5) and not read_back.keys.equal(new_kv.keys)
    captured = cache.stored(keys, values)
    assert all(
        one.view(torch.uint8).equal(other.flatten(1).view(torch.uint8)) for one, other in zip(captured, written[0][2:4], strict=True)
    )


def test_a_quantised_latent_layer_stores_its_keys_alone() -> None:
    layer: Any = SimpleNamespace(tp_k_head_num=1, qk_head_dim=6, v_head_dim=4)
    pool: Any = SimpleNamespace(dtype=torch.float8_e4m3fn)
    cache, joined = attention_backend.PoolLayer(pool, layer, latent=True), torch.randn(3, 1, 6).bfloat16()
    new_kv = cache.new_kv(joined, joined[..., :4])
    (travels,) = new_kv.stored.travelling
    assert travels.dtype == torch.float8_e4m3fn and travels.float().equal(joined.to(travels.dtype).float()) and new_kv.keys.equal(joined)
    keys, values = cache.stored(joined, joined[..., :4])
    assert keys.float().equal(travels.float()) and values.data_ptr() == keys.data_ptr() and values.shape == (3, 1, 4)


def test_a_checkpoint_s_scales_are_of_quantised_pools_alone() -> None:
    """--kv-cache-dtype bfloat16 with a checkpoint calibrated for FP8: the pool holds K/V as they are."""
    layer: Any = SimpleNamespace(tp_q_head_num=2, tp_k_head_num=2, qk_head_dim=4, v_head_dim=4, k_scale_float=0.5, v_scale_float=2.0)
    plain, quantised = (
        attention_backend.PoolLayer(SimpleNamespace(dtype=dtype), layer, latent=False) for dtype in (torch.bfloat16, torch.float8_e4m3fn)
    )
    assert (plain.scales, quantised.scales) == (NO_SCALES, KVScales(0.5, 2.0))
    keys = torch.randn(3, 8).bfloat16()
    assert all(cache.queries(keys).flatten(1).equal(keys) for cache in (plain, quantised))
    rounding = attention_backend.PoolLayer(quantised._pool, layer, latent=False, round_queries=True).queries(keys)
    assert rounding.dtype == keys.dtype and rounding.flatten(1).float().equal(keys.to(torch.float8_e4m3fn).float())
    assert plain.new_kv(keys, keys).stored.keys.flatten(1).equal(keys) and plain.stored(keys, keys)[0] is keys
