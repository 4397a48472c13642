"""The cost model against hand-computed steps, its data files, and bad files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_dcp.policy.cost_model import DATA_FOLDER, InstanceWork, available_cost_models, load_cost_model


def test_hand_computed_layer():
    model = load_cost_model("cpu", 2)
    idle = InstanceWork(0, 0, 0)
    busy = InstanceWork(kv_tokens=1000, attention_rows=4, home_requests=3)
    # constant 1000, attention 1000 x 1 + 4 x 5, dispatch 3 x 40, experts max(100, 20 x 1.5), combine 3 x 40
    assert model.layer_us([idle, busy]) == pytest.approx(1000 + 1000 + 20 + 120 + 100 + 120)
    assert model.step_us([idle, busy]) == pytest.approx(4 * 2360 + 5000)


def test_the_slowest_instance_ends_the_step():
    model = load_cost_model("deepseek-v3.h200", 32)
    even = [InstanceWork(100_000, 10, 10)] * 32
    skewed = [InstanceWork(200_000, 10, 10), InstanceWork(0, 10, 10), *even[2:]]
    assert model.step_us(skewed) - model.step_us(even) == pytest.approx(61 * 0.000444 * 100_000)


def test_exchange_is_free_without_routed_rows_and_fixed_for_all_with_one():
    model = load_cost_model("deepseek-v3.h200", 32)
    quiet = [InstanceWork(0, 1, 1)] * 2
    routed = [InstanceWork(0, 1, 1, routed_out=1), InstanceWork(0, 2, 1, routed_in=1)]
    assert model.exchange_us(quiet) == 0
    assert model.layer_us(routed) - model.layer_us(quiet) == pytest.approx(15.8 + 0.773, abs=0.01)
    remote = [InstanceWork(0, 1, 1, routed_out=1, remote_out=1), InstanceWork(0, 2, 1, routed_in=1, remote_in=1)]
    assert model.layer_us(remote) - model.layer_us(quiet) == pytest.approx(15.8 + 16 + 5.58, abs=0.01)


def test_live_shape_of_the_authors_is_reproduced():
    """Published: 62.8 ms between tokens at 64..78 rows on each of 32 H200; 175 k mean and 200 k hottest KV tokens are ours."""
    model = load_cost_model("deepseek-v3.h200", 32)
    work = [InstanceWork(200_000, 78, 78, 1, 1)] * 32
    assert model.step_us(work) / 1000 == pytest.approx(62.8, rel=0.03)


@pytest.mark.parametrize("name", available_cost_models())
def test_every_constant_has_a_source(name: str):
    data = json.loads((DATA_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert all(entry["source"].strip() for entry in data["constants"].values())
    assert data["expert_parallel_source"].strip()
    assert load_cost_model(name, 32).step_us([InstanceWork(1, 1, 1)] * 32) > 0


def test_pool_follows_memory_and_weights():
    assert load_cost_model("deepseek-v3.h200", 32).pool_tokens == pytest.approx(1_104_000, rel=0.01)
    assert load_cost_model("deepseek-v3.h100", 8).pool_tokens == 0
    assert load_cost_model("cpu", 4).pool_tokens is None


def test_bad_files_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"deepseek-v3\.h200"):
        load_cost_model("deepseek-v9", 8)
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="not JSON"):
        load_cost_model(str(broken), 8)
    data = json.loads((DATA_FOLDER / "cpu.json").read_text(encoding="utf-8"))
    del data["constants"]["projection_us"]
    missing = tmp_path / "missing.json"
    missing.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises((ValueError, TypeError), match="projection_us"):
        load_cost_model(str(missing), 8)
    data = json.loads((DATA_FOLDER / "cpu.json").read_text(encoding="utf-8"))
    data["constants"]["projection_us"]["value"] = -1
    missing.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match="projection_us must be >= 0"):
        load_cost_model(str(missing), 8)


def test_scaled_changes_one_constant():
    model = load_cost_model("cpu", 4)
    assert model.scaled("projection_us", 1.3).projection_us == pytest.approx(260)
    assert model.scaled("projection_us", 1.3).layer_other_us == model.layer_other_us
