"""Environment variables of ours beside SGLang's."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import pytest
from sgl_kernel_dcp.build import CACHE_VARIABLE

ROOT = Path(__file__).resolve().parents[3]
OLD_PREFIX = re.compile(r"\bSGL_[A-Z]\w+")


def test_sglang_takes_none_of_our_variables_for_an_old_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang warns of every variable that begins with SGL_, and makes one of another name of it."""
    from sglang.srt import environ

    monkeypatch.setattr(os, "environ", {CACHE_VARIABLE: "/somewhere"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environ._handle_deprecated_envs()
    assert os.environ == {CACHE_VARIABLE: "/somewhere"}


def test_nothing_of_ours_names_one_with_the_old_prefix() -> None:
    files = [path for folder in ("python", "sgl-kernel-dcp", "docker", "docs") for path in (ROOT / folder).rglob("*") if path.is_file()]
    found = {str(path.relative_to(ROOT)): names for path in files if (names := OLD_PREFIX.findall(path.read_text(errors="ignore")))}
    assert not found
