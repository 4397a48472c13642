"""Entry point `sglang.srt.plugins`: SGLang calls `register` early in each of its processes."""

from __future__ import annotations

import logging
import multiprocessing

logger = logging.getLogger(__name__)


def register() -> None:
    """Installs the hook sets of this process.

    `flags` always; `cpu` on a CPU device; `dyncp` in children of a server that was started with --enable-dyncp (the main process
    installs it when it has parsed that flag); `pd` in children of a prefill server.
    SGLang logs a plugin's exception and serves on without it, so a failure ends the process here instead.
    """
    from sglang_dcp.upstream.attach.hooks import DYNCP_HOOKS, FLAGS_HOOKS
    from sglang_dcp.upstream.attach.install import install
    from sglang_dcp.upstream.disaggregation.sending import is_prefill_server

    try:
        install(FLAGS_HOOKS)
        if _runs_on_cpu():
            from sglang_dcp.cpu.hooks import CPU_HOOKS

            install(CPU_HOOKS)
        if multiprocessing.parent_process() is not None and is_prefill_server():
            from sglang_dcp.upstream.attach.disaggregation_hooks import PREFILL_HOOKS

            install(PREFILL_HOOKS)
        if multiprocessing.parent_process() is not None and _enabled_by_parent():
            install(DYNCP_HOOKS)
    except Exception as error:
        raise SystemExit(f"sglang_dcp: {error}") from error


def _runs_on_cpu() -> bool:
    from sglang.srt.utils import is_cpu

    return bool(is_cpu())


def _enabled_by_parent() -> bool:
    from sglang_dcp.config import DynCpConfig

    return DynCpConfig.from_environment() is not None
