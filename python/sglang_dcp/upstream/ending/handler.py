"""How a server ends when an instance is lost: every client gets an answer first, then nothing is left behind.

SGLang's main process gets SIGQUIT when a process of it has died or failed. Its own handler kills everything at once; ours puts itself in
its place (a plain attribute of the tokenizer manager) and runs in the same event loop.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from multiprocessing import util
from typing import Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.tokenizer_manager import ServerStatus, SignalHandler
from sglang.srt.runtime_context import get_parallel

from sglang_dcp.config import DynCpConfig
from sglang_dcp.upstream.ending.dumps import dump_what_there_is, print_stacks
from sglang_dcp.upstream.ending.failure import MOST_CHARACTERS, describe_failures
from sglang_dcp.upstream.ending.family import Family, read_exit_codes
from sglang_dcp.upstream.ending.gate import GATE, Gate
from sglang_dcp.upstream.ending.progress import ProgressWatch, StepReport, describe_steps
from sglang_dcp.upstream.ending.shared_files import SharedFiles
from sglang_dcp.upstream.ending.temporary_folders import remove_folders

logger = logging.getLogger(__name__)

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong with the settings, start me again. Refused settings end with 1."""
ANSWER_SECONDS = 2.0
"""Longest time for answers to leave; a client that does not read gets no more."""
SWEEP_SECONDS = 0.02
LOOK_SECONDS = 1.0


def take_signals(manager: Any) -> None:
    """BEFORE TokenizerManager.auto_create_handle_loop: where SGLang makes its signal handler, it makes ours. Only the process that started
    the instances ends them: it has their watchdog. A tokenizer worker answers its clients (workers.py)."""
    manager.signal_handler_class = WorkerHandler if manager._subprocess_watchdog is None else EndingHandler


async def end_on_failure(original: Callable[[Any], Coroutine[Any, Any, None]], manager: Any) -> None:
    """AROUND TokenizerManager.handle_loop, where answers come in: an exception there ends the server, and SGLang would answer nobody."""
    try:
        await original(manager)
    except Exception as error:
        ending: EndingHandler | None = getattr(manager, "dyncp_ending", None)
        if ending is None:  # a tokenizer worker: it ends alone, and is started again
            raise
        logger.exception("dyncp: the main process cannot hand out answers any more")
        ending.end(f"the main process raised {type(error).__name__}: {error}"[:MOST_CHARACTERS])


class AnsweringHandler(SignalHandler):
    """Closes what is open in this process, in its event loop."""

    def __init__(self, manager: Any) -> None:
        super().__init__(manager)
        self._loop: asyncio.AbstractEventLoop = manager.event_loop
        self._gate: Gate = GATE
        self._tasks: set[asyncio.Task[None]] = set()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(self._loop.create_task(work))

    async def _answer_all(self, message: str) -> None:
        """Answers what is open, again and again: a request that is being tokenized cannot be answered before it is sent off."""
        manager = self.tokenizer_manager
        async with manager.is_pause_cond:
            manager.is_pause = False
            manager.is_pause_cond.notify_all()
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            self._close_requests(message)
            await asyncio.sleep(SWEEP_SECONDS)
            if not self._gate.open_answers or time.monotonic() > deadline:
                return

    def _close_requests(self, message: str) -> None:
        manager = self.tokenizer_manager
        reason = {"type": "abort", "status_code": HTTPStatus.SERVICE_UNAVAILABLE, "message": message}
        for rid, state in list(manager.rid_to_state.items()):
            if not state.dispatched:
                continue
            try:
                manager._handle_abort_req(AbortReq(rid=rid, finished_reason=reason, abort_message=message))
            except Exception:  # noqa: BLE001 - one request that SGLang cannot close must not keep all others open
                logger.exception("dyncp: request %s is answered without what it has so far", rid)
                manager.rid_to_state.pop(rid, None)
                state.finished = True
                state.out_list = [{"text": "", "output_ids": [], "meta_info": {"id": rid, "finish_reason": reason}}]
                state.event.set()


class WorkerHandler(AnsweringHandler):
    """In a tokenizer worker, whose main process passes SIGQUIT on and then ends everything."""

    def running_phase_sigquit_handler(self, signum: int | None = None, frame: Any = None) -> None:
        if self._gate.ending is None:
            self._gate.ending = "the server is ending, ask again later: a process of it failed, its log says which"
            self._start(self._answer_all(self._gate.ending))


class EndingHandler(AnsweringHandler):
    """In place of SGLang's SignalHandler. Made in the event loop's thread, when the first request or probe has come."""

    def __init__(self, manager: Any) -> None:
        super().__init__(manager)
        self._config = DynCpConfig.from_environment() or DynCpConfig()
        manager.dyncp_ending = self
        manager.dump_requests_before_crash = functools.partial(dump_what_there_is, manager.dump_requests_before_crash)
        self._is_ending = False
        self._family = Family(num_slices=get_parallel().attn_tp_size)
        self._family.refresh()
        self._files = SharedFiles()
        self._files.note([os.getpid(), *self._family.members])
        # After multiprocessing's own finalizers (priority 0 and above), which unlink what this process made.
        util.Finalize(None, self._leave_nothing, exitpriority=-100)
        # A probe that fails while requests drain: SGLang calls this, and would leave them without an answer.
        manager.force_exit_handler = lambda: self._close_requests("the server is shutting down: a health probe failed meanwhile")
        if self._config.hang_seconds:
            threading.Thread(target=self._watch_progress, name="dyncp-progress", daemon=True).start()

    def sigterm_handler(self, signum: int | None = None, frame: Any = None) -> None:
        """Open requests go on, new ones get 503; what is open after --dyncp-drain-seconds gets 503 too."""
        if self._gate.draining is not None:
            return super().sigterm_handler(signum, frame)
        self._gate.draining = "the server is shutting down: it takes no new requests"
        if self.tokenizer_manager.server_status == ServerStatus.UnHealthy:
            return self._start(self._shut_down_unhealthy())
        limit_s = self._config.drain_seconds
        message = f"the server is shutting down: the answer was not complete after --dyncp-drain-seconds {limit_s:g}"
        self._loop.call_later(limit_s, lambda: self._start(self._answer_all(message)))
        super().sigterm_handler(signum, frame)

    def running_phase_sigquit_handler(self, signum: int | None = None, frame: Any = None) -> None:
        """A process of ours has died, or says that it failed."""
        self.end("")

    def end(self, reason: str, *, hung: bool = False) -> None:
        """Ends the server once, with exit code 75. reason: what is known already; else it is looked up. hung: instances do not step."""
        if self._is_ending:
            return
        self._is_ending = True
        watchdog = self.tokenizer_manager._subprocess_watchdog
        self._family.refresh()
        causes = [reason] if reason else self._find_causes(watchdog)
        message = f"the server is ending, ask again later: {'; '.join(causes) or 'a process of it failed'}"
        logger.error("dyncp: %s", message)
        self._gate.ending = message
        if watchdog is not None:
            watchdog.stop()
        self._start(self._end(message, hung=hung))

    async def _shut_down_unhealthy(self) -> None:
        """After a failed health probe SGLang does not drain: it blocks this loop until all processes have gone. So answers come first."""
        await self._answer_all("the server is shutting down: it got SIGTERM after a health probe had failed")
        await asyncio.to_thread(print_stacks, self._family)
        super().sigterm_handler(signal.SIGTERM)

    async def _end(self, message: str, *, hung: bool) -> None:
        """Whatever goes wrong on the way, processes and files go and the code is 75."""
        began = time.monotonic()
        try:
            await self._answer_all(message)
            logger.error("dyncp: %d answers still open after %.2f s", self._gate.open_answers, time.monotonic() - began)
            if hung:  # an exception has its traceback in the log
                await asyncio.to_thread(print_stacks, self._family)
            await asyncio.to_thread(self.tokenizer_manager.dump_requests_before_crash)
        except Exception:  # noqa: BLE001 - a fault of a dump must not keep processes alive
            logger.exception("dyncp: the end goes on without what failed here")
        try:
            self._files.note([os.getpid(), *self._family.members])
            await asyncio.to_thread(self._family.kill)
            self._files.unlink()
            remove_folders()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_CODE)

    def _find_causes(self, watchdog: Any) -> list[str]:
        """A death by signal explains the failures of peers, so it is named alone."""
        dead = [] if watchdog is None else self._family.describe_dead(read_exit_codes(watchdog._processes))
        manager = self.tokenizer_manager
        return dead or describe_failures(
            manager.load_snapshot_reader.read_all(), manager.dyncp_limits.num_instances // self._config.num_nodes
        )

    def _watch_progress(self) -> None:
        """Thread: the event loop may be busy, and must not be."""
        manager = self.tokenizer_manager
        watch = ProgressWatch(self._config.hang_seconds, manager.dyncp_limits.num_instances)
        while not self._is_ending:
            time.sleep(LOOK_SECONDS)
            reports = [_read_report(snapshot) for snapshot in manager.load_snapshot_reader.read_all()]
            has_work = not manager.is_pause and any(state.dispatched for state in list(manager.rid_to_state.values()))
            if watch.is_hung(time.monotonic(), reports, has_work=has_work):
                stopped = self._family.describe_stopped()
                where = "; ".join([*stopped, describe_steps(reports)])
                reason = f"no step for {self._config.hang_seconds:g} s (--dyncp-hang-seconds): {where}"
                self._loop.call_soon_threadsafe(functools.partial(self.end, reason, hung=True))
                return

    def _leave_nothing(self) -> None:
        """At the end of an orderly shutdown, when SGLang has killed what it started."""
        self._files.unlink()


def _read_report(snapshot: Any) -> StepReport:
    is_warm = snapshot.total_prefill_uncached_tokens > 0 and snapshot.decode_moments is not None
    return StepReport(int(snapshot.dp_rank), float(snapshot.timestamp), int(getattr(snapshot, "dyncp_step", 0)), is_warm)
