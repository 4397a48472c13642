"""Several tokenizer workers: which application they import, which limits they learn, and that a foreign application is refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dcp.config import CONFIG_VARIABLE, DynCpConfig
from sglang_dcp.cpu.environment import count_cuda_devices, cpu_additions
from sglang_dcp.upstream.attach.settings import find_front_refusal
from sglang_dcp.upstream.front import requests
from sglang_dcp.upstream.front.tokenizer_workers import APP_VARIABLE, POOL_KEY, WORKER_APP, PoolTokens, select_worker_app

FOREIGN = "sglang.srt.entrypoints.http_server:app"


def test_workers_import_our_application_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(APP_VARIABLE, raising=False)
    select_worker_app(True)
    assert os.environ[APP_VARIABLE] == WORKER_APP
    assert find_front_refusal(False, 2, WORKER_APP) is None
    select_worker_app(False)
    assert APP_VARIABLE not in os.environ


def test_an_application_of_the_users_stays_and_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(APP_VARIABLE, FOREIGN)
    select_worker_app(True)
    select_worker_app(False)
    assert os.environ[APP_VARIABLE] == FOREIGN
    assert find_front_refusal(False, 1, FOREIGN) is None, "SGLang does not look at it with one worker"
    message = str(find_front_refusal(False, 2, FOREIGN))
    assert message.startswith(f"{APP_VARIABLE}={FOREIGN} does not work with --enable-dyncp and --tokenizer-worker-num 2: its requests")


class Manager:
    """In the place of SGLang's tokenizer manager."""

    dyncp_limits: requests.RequestLimits


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> type[Manager]:
    """The parts of SGLang that limits are read from: two instances with pages of 16 tokens."""
    monkeypatch.setattr("sglang.srt.managers.tokenizer_manager.TokenizerManager", Manager)
    monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: SimpleNamespace(num_dp_ranks=2))
    monkeypatch.setattr("sglang.srt.runtime_context.get_schedule", lambda: SimpleNamespace(page_size=16))
    monkeypatch.setenv(CONFIG_VARIABLE, DynCpConfig().to_json())
    return Manager


def test_a_worker_learns_the_smallest_pool_of_all(manager: type[Manager], monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang hands workers the answer of scheduler 0 alone, and pools may differ."""
    infos = [{"max_total_num_tokens": 2048}, {"max_total_num_tokens": 1024}]
    router = SimpleNamespace()
    ends: list[Any] = []
    monkeypatch.setattr(requests, "end_on_sigquit", ends.append)
    requests.learn_limits((router, None, None, SimpleNamespace(scheduler_infos=infos), "watchdog"), object)
    assert ends == ["watchdog"]
    assert not hasattr(router, "dyncp_limits"), "the main process checks nothing where workers do"
    assert infos[0][POOL_KEY] == 1024
    worker = manager()
    requests.learn_worker_limits(None, SimpleNamespace(tokenizer_manager=worker, scheduler_info=infos[0]))
    assert (worker.dyncp_limits.pool_tokens, worker.dyncp_limits.num_instances, worker.dyncp_limits.page_size) == (1024, 2, 16)


def test_a_worker_of_an_engine_learns_the_same(manager: type[Manager]) -> None:
    worker = manager()
    requests.learn_engine_limits((worker, None), None, None, {POOL_KEY: 1024})
    assert worker.dyncp_limits.pool_tokens == 1024


def test_one_process_learns_the_same(manager: type[Manager]) -> None:
    alone = manager()
    requests.learn_limits((alone, None, None, SimpleNamespace(scheduler_infos=[{"max_total_num_tokens": 512}])), object)
    assert alone.dyncp_limits.pool_tokens == 512


def test_limits_are_not_made_up_without_a_configuration(manager: type[Manager], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_VARIABLE)
    with pytest.raises(RuntimeError, match="no configuration came with the environment"):
        requests.limits_of(1024)


IMPORT = """
from sglang_dcp.upstream.front.worker_app import app
from sglang_dcp.upstream.attach import install
from sglang_dcp.upstream.attach.main_hooks import DYNCP_MAIN_HOOKS
assert install._installed == list(DYNCP_MAIN_HOOKS), install._installed
assert "/dyncp/requests" in {getattr(route, "path", None) for route in app.routes}
"""


JOIN = """
import sys
from sglang_dcp.config import DynCpConfig
from sglang.srt.managers.multi_tokenizer_mixin import read_from_shared_memory
assert DynCpConfig.from_environment() is None
told = read_from_shared_memory(sys.argv[1])
assert (told, DynCpConfig.from_environment().max_degree) == ({"dyncp_pool_tokens": 1024}, 2), told
from sglang_dcp.upstream.attach import install
from sglang_dcp.upstream.attach.main_hooks import DYNCP_MAIN_HOOKS
assert install._installed == list(DYNCP_MAIN_HOOKS), install._installed
from sglang.srt.entrypoints.engine import Engine
assert Engine._init_tokenizer_worker.__wrapped__
"""


@pytest.mark.own_process
def test_a_process_that_reads_the_pool_size_checks_requests_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine.attach_tokenizer_worker() loads no plugins, and its process need not be a child of the server. The next one can join too."""
    monkeypatch.setenv(CONFIG_VARIABLE, DynCpConfig(max_degree=2).to_json())
    told = pickle.dumps({POOL_KEY: PoolTokens(1024)})
    monkeypatch.delenv(CONFIG_VARIABLE)
    memory = SharedMemory(f"multi_tokenizer_args_{os.getpid()}", create=True, size=len(told))
    try:
        memory.buf[: len(told)] = told
        run_alone(JOIN, memory.name)
        SharedMemory(memory.name).close()
    finally:
        memory.close()
        memory.unlink()


@pytest.mark.own_process
def test_importing_the_application_installs_what_the_main_process_has() -> None:
    """In a process of its own, as a worker is."""
    run_alone(IMPORT)


def run_alone(script: str, *arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
    environment |= cpu_additions(1, environment, has_cuda_driver=count_cuda_devices() is not None)
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert result.returncode == 0, result.stderr[-2000:]
