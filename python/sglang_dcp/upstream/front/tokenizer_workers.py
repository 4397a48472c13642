"""Several tokenizer workers: each process checks its requests, with the limits that the main process has learned."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import Any

from sglang_dcp.config import CONFIG_VARIABLE

APP_VARIABLE = "SGLANG_HTTP_SERVER_APP_PATH"
"""SGLang's name for the application that tokenizer workers import."""
WORKER_APP = "sglang_dcp.upstream.front.worker_app:app"
POOL_KEY = "dyncp_pool_tokens"
"""Tokens of the smallest pool, among what SGLang hands from the main process to its workers: the answer of scheduler 0."""


class PoolTokens(int):
    """The number under POOL_KEY. Whoever reads it out of shared memory has our configuration and touch points with it, because SGLang loads
    no plugins there: a process that joins by Engine.attach_tokenizer_worker() would check nothing otherwise."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return join_server, (int(self), os.environ[CONFIG_VARIABLE], os.getpid())


def join_server(pool_tokens: int, config: str, server: int) -> PoolTokens:
    """Makes this process one that checks requests. config: the server's, as JSON. server: its main process."""
    os.environ[CONFIG_VARIABLE] = config
    _leave_shared_memory(server)
    from sglang_dcp.upstream.attach.install import install
    from sglang_dcp.upstream.attach.main_hooks import DYNCP_MAIN_HOOKS

    install(DYNCP_MAIN_HOOKS)
    return PoolTokens(pool_tokens)


def select_worker_app(enabled: bool) -> None:
    """Workers that start from now on import our application, unless the user chose one (find_app_refusal)."""
    if enabled:
        os.environ.setdefault(APP_VARIABLE, WORKER_APP)
    elif os.environ.get(APP_VARIABLE) == WORKER_APP:
        del os.environ[APP_VARIABLE]


def find_app_refusal(workers: int, app: str | None, reason: str) -> str | None:
    """The message for an application of the user's, which would serve without our checks, or None. app: the variable's value."""
    if workers == 1 or app == WORKER_APP:
        return None
    return f"{APP_VARIABLE}={app} does not work with --enable-dyncp and --tokenizer-worker-num {workers}: {reason}"


def _leave_shared_memory(server: int) -> None:
    """Python's resource tracker unlinks what a process has opened when it ends: nobody could join after the first that leaves, and a worker
    that is started again would end the server. Children of the server share its tracker."""
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid != server:
        resource_tracker.unregister(f"/multi_tokenizer_args_{server}", "shared_memory")
