"""Real SGLang on a GPU against stock SGLang with one large pool. test/gpu/runtime_check.py says what is compared.

The cases of a group are served side by side, once, when the first of them is asked for; each is a test. Logs and reports stay in
$DYNCP_GPU_LOGS, if set.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU on this machine", allow_module_level=True)

HERE = Path(__file__).parent
GROUPS = {"two": ("gqa", "mla", "gqa_gloo"), "four": ("gqa4", "mla4"), "float32": ("gqa_f32",)}
LIMIT_S = {"two": 210, "four": 280, "float32": 150}
"""With warm caches a third to a half of this; a machine that compiles first takes DYNCP_GPU_LIMIT_FACTOR."""


@functools.cache
def report_of(group: str) -> tuple[dict[str, Any], str]:
    """(the report, the end of what the check printed)."""
    out = Path(os.environ.get("DYNCP_GPU_LOGS") or tempfile.mkdtemp(prefix="dyncp_gpu_")) / group
    limit = LIMIT_S[group] * float(os.environ.get("DYNCP_GPU_LIMIT_FACTOR", "1"))
    command = [sys.executable, str(HERE / "runtime_check.py"), str(out), "--limit", str(limit), "--only", ",".join(GROUPS[group])]
    # The kernels' own tests set it for instances that share a process.
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_DEVICE_MAX_CONNECTIONS"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=limit + 60)
    path = out / "runtime_check.json"
    return json.loads(path.read_text()) if path.is_file() else {"checks": {}}, f"{done.stdout[-4000:]}\nlogs: {out}"


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("group", "case"), [(group, case) for group, cases in GROUPS.items() for case in cases])
def test_equal_to_stock(group: str, case: str) -> None:
    sys.path[:0] = [path for path in (str(HERE), str(HERE.parent)) if path not in sys.path]
    from runtime_check import case_holds

    report, printed = report_of(group)
    result = report["checks"].get(case, {"stages": {}})
    for name, stage in result["stages"].items():
        scores = {key: round(stage["all"][key], 6) for key in ("mean", "p99", "max")} if "all" in stage else {}
        print(case, name, "ok" if stage["ok"] else "FAILED", f"{stage['seconds']} s", scores, stage.get("degrees"), stage.get("steps"))
    failed = {name: stage.get("error", "out of bounds") for name, stage in result["stages"].items() if not stage["ok"]}
    assert case_holds(result), f"{case}: failed {failed}, complete: {result.get('complete', False)}\n{printed}"
