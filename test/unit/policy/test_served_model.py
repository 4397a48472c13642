"""Constants of a served model: which ones, how they are brought to its size, and what they make of short and long requests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmark.multi_gpu.model_shapes import SHAPES, SMALL_SHAPES
from sglang_dcp.policy.cost_model import DATA_FOLDER, CostModel, InstanceWork, available_cost_models, load_cost_model
from sglang_dcp.policy.dual_balance import DualBalance
from sglang_dcp.policy.served_model import ServedModel, nearest_constants, served_cost
from sglang_dcp.policy.split_limits import SplitRule
from sglang_dcp.policy.types import InstanceLoad, PlacementRequest

H200 = "NVIDIA H200"
FULL_LAYERS = {"qwen3-235b-a22b": 94, "deepseek-v3": 61}


def served(shape: str, num_layers: int, device: str = H200, **changes: Any) -> ServedModel:
    config = (SHAPES | SMALL_SHAPES)[shape] | {"num_hidden_layers": num_layers} | changes
    return ServedModel.of_config(SimpleNamespace(**config), device)


MEASURED = ("exchange_fixed_us", "exchange_us_per_row", "sharded_step_fixed_us", "sharded_step_us_per_row", "host_step_us", "step_fixed_us")
MEASURED += ("attention_fixed_us", "attention_us_per_token", "attention_us_per_row")
TINY = ServedModel("cpu", 2, 4, False, 512, 1040, 128, 2)


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize(("device", "card"), [(H200, "h200"), ("NVIDIA H100 80GB HBM3", "h100")])
def test_a_model_that_ships_gets_its_own_constants(shape: str, device: str, card: str) -> None:
    """In FP8, as its constants are; everything that was measured in our own runtime in place of the authors'."""
    fp8 = {"quantization_config": {"quant_method": "fp8"}}
    cost = served_cost(None, served(shape, FULL_LAYERS[shape], device, **fp8), 8)
    shipped = load_cost_model(f"{shape}.{card}", 8)
    ours = {name: getattr(cost.model, name) for name in (*MEASURED, "expert_weight_us", "expert_token_share")}
    assert dataclasses.replace(shipped, **ours) == cost.model and not cost.warnings
    assert cost.model.exchange_fixed_us < shipped.exchange_fixed_us and cost.model.step_fixed_us == 0
    assert cost.model.sharded_step_us_per_row > 0 and cost.model.host_step_us > 0
    assert cost.model.expert_weight_us == pytest.approx(shipped.expert_weight_us, rel=0.06), "some layers have no experts"


def test_sizes_of_a_layer_are_those_of_the_exchange_that_was_measured() -> None:
    """The bytes of one routed row, as in benchmark/results/multi_gpu.json."""
    assert served("qwen3-235b-a22b", 4).exchange_bytes_per_row == 33_024 and served("deepseek-v3", 4).exchange_bytes_per_row == 279_040
    for name in available_cost_models():
        data = json.loads((DATA_FOLDER / f"{name}.json").read_text())
        if data["model"] in SHAPES | SMALL_SHAPES:
            model = served(data["model"], 1)
            assert data["layer"]["exchange_bytes_per_row"] == model.exchange_bytes_per_row
            assert data["kv_bytes_per_token_layer"] == model.kv_bytes_per_token


def test_fewer_layers_make_the_hosts_part_dearer() -> None:
    full, few = (served_cost(None, served("qwen3-235b-a22b", layers), 2) for layers in (94, 4))
    assert full.model.attention_us_per_token == few.model.attention_us_per_token
    assert few.model.sharded_row_us == pytest.approx(full.model.sharded_row_us * 94 / 4)
    assert not full.warnings and few.warnings == (
        "cost model qwen3-235b-a22b.h200 is of 94 layers, the served model has 4: taken per layer",
    )
    assert few.description == "qwen3-235b-a22b.h200, 94 layers there, 4 here, scaled to the served model's sizes"


def test_other_models_are_scaled_from_the_nearest() -> None:
    """Half the heads of Qwen3-30B over half its K/V, half of its hidden size, a quarter of its experts' bytes."""
    half = {"num_attention_heads": 16, "num_key_value_heads": 2, "hidden_size": 1024, "moe_intermediate_size": 384}
    base, small = (served_cost(None, served("qwen3-30b-a3b", 48, **changes), 2).model for changes in ({}, half))
    assert nearest_constants(served("qwen3-30b-a3b", 48)) == nearest_constants(served("qwen3-30b-a3b", 48, **half)) == "qwen3-30b-a3b.h200"
    assert small.attention_us_per_token == pytest.approx(base.attention_us_per_token / 2, rel=0.05), "measured, both of them"
    assert small.exchange_us_per_row == pytest.approx(base.exchange_us_per_row / 2)
    assert small.combine_us_per_request == pytest.approx(base.combine_us_per_request / 2)
    assert small.expert_weight_us == pytest.approx(base.expert_weight_us / 4)
    assert nearest_constants(served("qwen3-235b-a22b", 94)) == "qwen3-235b-a22b.h200", "the same K/V as Qwen3-30B, other rows"
    assert nearest_constants(served("deepseek-v3", 61, num_attention_heads=64)) == "kimi-k2.h200"
    wide = served_cost(None, served("qwen3-235b-a22b", 94, num_key_value_heads=16), 2)
    eight = served_cost(None, served("qwen3-235b-a22b", 94, num_key_value_heads=8), 2)
    assert wide.model.attention_us_per_token == pytest.approx(2 * eight.model.attention_us_per_token)
    assert "attention of a token is scaled by 4" in wide.warnings[0]


def test_an_unknown_card_is_warned_of() -> None:
    assert served_cost(None, served("qwen3-235b-a22b", 94, "NVIDIA B200"), 2).warnings == (
        "cost model qwen3-235b-a22b.h100: no constants for NVIDIA B200",
    )


def test_given_constants_stay_as_they_are_per_layer(tmp_path: Path) -> None:
    data = json.loads((DATA_FOLDER / "qwen3-235b-a22b.h200.json").read_text())
    data["constants"]["attention_us_per_token"]["value"] = 0.0123
    path = tmp_path / "own.json"
    path.write_text(json.dumps(data))
    cost = served_cost(str(path), served("deepseek-v3", 40), 2)
    assert (cost.model.attention_us_per_token, cost.model.num_layers) == (0.0123, 40)
    assert "40 layers" not in str(cost.warnings) and "is of 94 layers, the served model has 40" in cost.warnings[0]
    assert served_cost("deepseek-v3.h200", served("deepseek-v3", 61), 2).warnings == ()


def test_on_a_cpu_placement_is_what_it_was() -> None:
    """The tiny models' constants, whatever the number of layers."""
    cost, shipped = served_cost(None, TINY, 4).model, load_cost_model("cpu", 4)
    assert dataclasses.replace(cost, num_layers=4, prefill_us_per_token=100.0, prefill_attention_us_per_token_context=1.0) == shipped
    for prompt in (10, 100, 300, 900):
        assert place(cost, prompt, [0, 40, 80, 500], 16) == place(shipped, prompt, [0, 40, 80, 500], 16)
    assert served_cost(None, None, 4).model == shipped


@pytest.mark.parametrize("name", available_cost_models())
def test_what_the_simulator_loads_has_no_host_part(name: str) -> None:
    model = load_cost_model(name, 8)
    assert model.sharded_step_fixed_us == model.sharded_step_us_per_row == model.sharded_row_us == model.sharded_fixed_us == 0
    data = json.loads((DATA_FOLDER / f"{name}.json").read_text())
    assert model.exchange_fixed_us == data["constants"]["exchange_fixed_us"]["value"]
    assert all(entry["source"].strip() for entry in data.get("serving", {}).values())


def test_host_part_of_a_step() -> None:
    model = dataclasses.replace(load_cost_model("cpu", 2), sharded_step_fixed_us=100.0, sharded_step_us_per_row=10.0)
    quiet = [InstanceWork(10, 1, 1), InstanceWork(10, 1, 1)]
    routed = [InstanceWork(10, 1, 1, routed_out=3), InstanceWork(10, 1, 1, routed_in=5)]
    plain = load_cost_model("cpu", 2)
    assert model.step_us(quiet) == plain.step_us(quiet)
    assert model.step_us(routed) == pytest.approx(plain.step_us(routed) + 100 + 5 * 10)


def place(cost: CostModel, prompt: int, held: list[int], page_size: int = 64, guests: int = 0) -> Any:
    loads = [InstanceLoad(rank, 0, tokens, 700_000, guests, home_requests=4, attention_rows=4) for rank, tokens in enumerate(held)]
    return DualBalance(cost, SplitRule(len(held))).place(PlacementRequest(prompt, 256, 400), loads, page_size)


@pytest.mark.parametrize("layers", [4, 94])
@pytest.mark.parametrize("guests", [0, 1000])
@pytest.mark.parametrize("prompt", [128, 866, 1314, 2048, 3000])
def test_short_requests_stay_whole(layers: int, guests: int, prompt: int) -> None:
    """Level instances, with and without an exchange that runs already. By the tiny models' constants each of these was spread."""
    cost = served_cost(None, served("qwen3-235b-a22b", layers), 2).model
    assert place(cost, prompt, [50_000, 50_000], guests=guests).degree == 1
    if prompt > 500:
        assert place(load_cost_model("cpu", 2), prompt, [50_000, 50_000], guests=guests).degree == 2


def test_a_request_is_spread_when_that_saves_more_than_the_host_costs() -> None:
    """By how much depends on the layers: 100 us of host time are 25 us a layer of 4, and 1 us a layer of 94."""
    few, full = (served_cost(None, served("qwen3-235b-a22b", layers), 2).model for layers in (4, 94))
    assert place(full, 65_536, [50_000, 50_000]).degree == 2 and place(few, 65_536, [50_000, 50_000]).degree == 1
    assert place(few, 262_144, [50_000, 50_000]).degree == 2


def test_a_config_without_heads_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        ServedModel.of_config(SimpleNamespace(num_hidden_layers=2), "cpu")


def test_a_quantised_pool_costs_what_was_measured() -> None:
    """Half the bytes, and by benchmark/results/fp8.json 0.7 of the time (fa3, which a server runs where nobody names a kernel)."""
    config = SimpleNamespace(**(SHAPES | SMALL_SHAPES)["qwen3-235b-a22b"], num_hidden_layers=94)
    plain, quantised = (ServedModel.of_config(config, H200, kv_bytes) for kv_bytes in (2, 1))
    assert plain.kv_bytes_per_token == 2 * quantised.kv_bytes_per_token == 2048
    costs = [served_cost(None, model, 2) for model in (plain, quantised)]
    assert costs[1].model.attention_us_per_token / costs[0].model.attention_us_per_token == pytest.approx(0.69, abs=0.02)
    assert plain.exchange_bytes_per_row == quantised.exchange_bytes_per_row, "queries and partial results stay as they are"
    assert not costs[1].warnings
    unknown = served_cost(None, dataclasses.replace(quantised, device="NVIDIA H100 80GB HBM3"), 2)
    assert unknown.warnings == ("cost model qwen3-235b-a22b.h100 has no constants for K/V in fp8_e4m3: bfloat16's are taken",)
    assert unknown.model == served_cost(None, dataclasses.replace(plain, device="NVIDIA H100 80GB HBM3"), 2).model


def test_window_layers_attend_nothing_of_a_long_row() -> None:
    """gpt-oss-120b: every other layer; Step-3.5-Flash: three of four, K/V heads and experts by names of its own."""
    kinds = ["sliding_attention", "full_attention"] * 18
    sizes = {"num_hidden_layers": 36, "hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64}
    sizes |= {
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "intermediate_size": 2880,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    whole, windows = (ServedModel.of_config(SimpleNamespace(**sizes, layer_types=some), H200) for some in ([], kinds))
    assert (whole.window_share, windows.window_share) == (0.0, 0.5) and windows.kv_bytes_per_token == whole.kv_bytes_per_token == 2048
    assert windows.expert_bytes == int(128 * 3 * 2880 * 2880 * 4.25 / 8)
    costs = [served_cost(None, model, 2).model for model in (whole, windows)]
    for name in ("attention_us_per_token", "prefill_attention_us_per_token_context"):
        assert getattr(costs[1], name) == pytest.approx(getattr(costs[0], name) / 2)
    assert costs[1].attention_us_per_row == costs[0].attention_us_per_row, "a row is a row in every layer"
    step = {"num_hidden_layers": 45, "hidden_size": 4096, "num_attention_heads": 64, "num_attention_groups": 8, "head_dim": 128}
    step |= {"moe_num_experts": 288, "moe_top_k": 8, "moe_intermediate_size": 1280}
    # Its list has three entries more, for layers that predict further tokens.
    flash = ServedModel.of_config(SimpleNamespace(**step, layer_types=(["full_attention"] + ["sliding_attention"] * 3) * 12), H200)
    assert flash.window_share == pytest.approx(33 / 45) and flash.kv_bytes_per_token == 4096 and flash.experts_per_token == 8


def test_bytes_of_the_weights_are_those_of_the_checkpoint() -> None:
    """A step of few tokens reads the experts that they choose, whatever the batch could choose."""
    sizes = {bits: served("qwen3-30b-a3b", 48, quantization_config={"bits": bits}).expert_bytes for bits in (4, 8)}
    plain = served("qwen3-30b-a3b", 48)
    assert sizes[8] == 2 * sizes[4] and plain.expert_bytes == 2 * sizes[8] == 128 * 3 * 2048 * 768 * 2
    model = served_cost(None, plain, 2).model
    assert model.expert_us(1) == pytest.approx(model.expert_weight_us / 16) and model.expert_us(1000) == model.expert_weight_us
    assert served_cost(None, plain, 4).model.expert_weight_us == pytest.approx(model.expert_weight_us / 2), "half on each of twice as many"


def test_a_long_row_that_is_not_split_is_priced_by_itself() -> None:
    """--dyncp-split-budget stock: 300,000 tokens among 128 rows take 3.3 ms a layer, and splitting them over two instances halves that."""
    ours, stock = (served_cost(None, served("qwen3-30b-a3b", 48), 2, split).model for split in ("auto", "stock"))
    work = InstanceWork(427_000, 128, 128, longest_row=300_000, captured_rows=192)
    assert ours.attention_us(work) == pytest.approx(ours.attention_us(dataclasses.replace(work, longest_row=0)))
    assert stock.attention_us(work) / 1000 == pytest.approx(3.3, rel=0.03)
    assert stock.attention_us(dataclasses.replace(work, longest_row=1000)) == ours.attention_us(work), "rows of equal length"
    held = [20_000, 400_000]
    assert (place(ours, 100_000, held).degree, place(stock, 100_000, held).degree) == (1, 2)


@pytest.mark.parametrize("given", [None, "qwen3-30b-a3b.h200"])
def test_a_split_that_was_not_measured_with_quantised_pools_is_warned_of(given: str | None) -> None:
    """Also where the constants are named: those of our split are not the ones that this server is priced by."""
    quantised = dataclasses.replace(served("qwen3-30b-a3b", 48), kv_bytes_per_token=1024, kv_element_bytes=1)
    ours, stock = (served_cost(given, quantised, 2, split).warnings for split in ("auto", "stock"))
    assert (ours, len(stock)) == ((), 1) and "no constants for K/V in fp8_e4m3" in stock[0]


@pytest.mark.parametrize("is_named", [False, True])
def test_a_split_that_was_not_measured_on_the_card_is_warned_of(is_named: bool) -> None:
    """All that was measured there stays: what is missing is the price of a long row that one thread block reads."""
    model = served("qwen3-30b-a3b", 48, "NVIDIA H100 80GB HBM3")
    ours, stock = (served_cost("qwen3-30b-a3b.h100" if is_named else None, model, 2, split) for split in ("auto", "stock"))
    assert (ours.warnings, len(stock.warnings)) == ((), 1)
    assert "qwen3-30b-a3b.h100 has no constants for --dyncp-split-budget stock" in stock.warnings[0]
    measured = ("attention_fixed_us", "attention_us_per_token", "attention_us_per_row")
    assert [getattr(stock.model, name) for name in measured] == [getattr(ours.model, name) for name in measured]


@pytest.mark.parametrize("given", [None, "deepseek-v3.h100"])
def test_latent_attention_has_no_split_budget(given: str | None) -> None:
    """--dyncp-split-budget is of FlashInfer's kernel for GQA: MLA's prices are the same with either."""
    model = served("deepseek-v3", 61, "NVIDIA H100 80GB HBM3")
    ours, stock = (served_cost(given, model, 2, split) for split in ("auto", "stock"))
    assert ours == stock and not ours.warnings


def test_a_file_of_the_operators_says_how_its_rows_are_split(tmp_path: Path) -> None:
    """`calibrate` measures kernels that split long rows; a file may have the constants of others."""
    data = json.loads((DATA_FOLDER / "qwen3-30b-a3b.h200.json").read_text())
    plain, unsplit = tmp_path / "plain.json", tmp_path / "unsplit.json"
    plain.write_text(json.dumps(data))
    data["constants"] |= {"attention_us_per_unsplit_token": {"value": 0.011}, "attention_chunks": {"value": 66}}
    unsplit.write_text(json.dumps(data))
    model = served("qwen3-30b-a3b", 48)
    said = [len(served_cost(str(path), model, 2, split).warnings) for path in (plain, unsplit) for split in ("auto", "stock")]
    assert said == [0, 1, 0, 0]


@pytest.mark.parametrize("given", [None, "qwen3-30b-a3b.h200"])
def test_chunks_are_counted(given: str | None) -> None:
    assert repr(served_cost(given, served("qwen3-30b-a3b", 48), 2, "stock").model.attention_chunks) == "66"
