"""Every touch point on SGLang. `docs/upstream_hooks.md` is generated from here.

`install.py` turns the records into patches and refuses to serve when one is missing.
"""

from __future__ import annotations

from sglang_dcp.cpu.hooks import CPU_HOOKS
from sglang_dcp.upstream.attach.disaggregation_hooks import PREFILL_HOOKS
from sglang_dcp.upstream.attach.hook import Hook
from sglang_dcp.upstream.attach.hooks import DYNCP_HOOKS, FLAGS_HOOKS
from sglang_dcp.upstream.attach.install import find_problems
from sglang_dcp.upstream.attach.main_hooks import DYNCP_MAIN_HOOKS


def all_hooks() -> tuple[Hook, ...]:
    """Every touch point of every set."""
    return FLAGS_HOOKS + CPU_HOOKS + DYNCP_HOOKS + DYNCP_MAIN_HOOKS + PREFILL_HOOKS


def check_targets() -> list[str]:
    """Problems with the targets in the installed SGLang: one line each, empty when all resolve."""
    return find_problems(all_hooks())
