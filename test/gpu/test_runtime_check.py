"""Real SGLang on a GPU against stock SGLang with one large pool. test/gpu/runtime_check.py says what is compared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU on this machine", allow_module_level=True)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("check", ["gqa", "mla", "mla_flashmla", "gqa_gloo"])
def test_equal_to_stock(check: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("runtime_check.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out"), "--limit", "1200", "--only", check], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
