"""Real SGLang on a Hopper GPU against stock SGLang with one large pool. testing/gpu/runtime_check.py says what is compared.

One run of it serves all cases that were asked for, in waves; each case is a test. $DYNCP_GPU_LOGS keeps logs and report,
$DYNCP_GPU_SECONDS bounds the run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from testing.gpu.runtime_check import case_holds

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("no Hopper GPU on this machine", allow_module_level=True)

REPOSITORY = Path(__file__).resolve().parents[2]
WAVES = (
    ("gqa", "mla", "gqa_gloo"),
    ("gqa4", "mla4"),
    ("gqa_tp2",),
    ("gqa_f32", "mla_flashmla"),
    ("gqa_fp8", "gqa_fa3"),
    ("gqa_fa3_fp8", "mla_flashmla_fp8"),
)
CASES = [case for wave in WAVES for case in wave]


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """(the report, the end of what the check printed)."""
    asked = {item.callspec.params["case"] for item in request.session.items if item.path == request.path and hasattr(item, "callspec")}
    waves = [[case for case in wave if case in asked] for wave in WAVES]
    only = "/".join(",".join(wave) for wave in waves if wave)
    out = Path(os.environ.get("DYNCP_GPU_LOGS") or tmp_path_factory.mktemp("runtime_check"))
    limit = float(os.environ.get("DYNCP_GPU_SECONDS", "900"))
    # The kernels' own tests set it for instances that share a process.
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_DEVICE_MAX_CONNECTIONS"}
    command = [sys.executable, "-m", "testing.gpu.runtime_check", str(out), "--limit", str(limit), "--only", only]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, **pipes, env=environment, cwd=REPOSITORY, timeout=limit + 60)
    path = out / "runtime_check.json"
    printed = f"{done.stdout[-4000:]}\nlogs: {out}"
    return json.loads(path.read_text()) if path.is_file() else {"checks": {}}, printed


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("case", CASES)
def test_equal_to_stock(case: str, report: tuple[dict[str, Any], str]) -> None:
    found, printed = report
    result = found["checks"].get(case, {"stages": {}})
    for name, stage in result["stages"].items():
        scores = {key: round(stage["all"][key], 7) for key in ("mean", "p99", "max")} if "all" in stage else {}
        print(case, name, "ok" if stage["ok"] else "FAILED", f"{stage['seconds']} s", scores, stage.get("degrees"), stage.get("steps"))
    failed = {name: stage.get("error", "out of bounds") for name, stage in result["stages"].items() if not stage["ok"]}
    why = result.get("error") or (None if result.get("complete") else f"{case} did not come to its end")
    assert case_holds(result), f"{case}: {why}, failed stages {failed}\n{printed}"
