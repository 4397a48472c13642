"""A plugin of the tests alone: writes which SGLang targets are patched in this process, for as long as that changes; and makes a process
raise, or go apart from its peers, when a test says so, by a file.

Found by SGLang through the folder beside this file when a test puts this folder on PYTHONPATH.
"""

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

FOLDER_VARIABLE = "DYNCP_HOOK_PROBE"
RAISE_VARIABLE = "DYNCP_RAISE_FILE"
APART_VARIABLE = "DYNCP_APART_FILE"
"""Both name a file. The process that it holds ("1": instance 1, "1.0": its first slice, where it has several) raises in its next forward
pass, or has books from then on that say something else than those of all others."""


def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for variable, handler in ((RAISE_VARIABLE, _raise_when_told), (APART_VARIABLE, _go_apart_when_told)):
        if variable in os.environ:
            HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.run_batch", handler, HookType.BEFORE)
    if FOLDER_VARIABLE not in os.environ:
        return
    threading.Thread(target=_report, args=(Path(os.environ[FOLDER_VARIABLE]),), daemon=True).start()


def _raise_when_told(scheduler, *args, **kwargs):
    if _is_meant(RAISE_VARIABLE):
        raise RuntimeError("told to raise by a test")


def _go_apart_when_told(scheduler, *args, **kwargs):
    if _is_meant(APART_VARIABLE):
        from sglang_dcp.upstream.step.attached import current

        current().participant.decisions.value += 1


def _is_meant(variable):
    path = Path(os.environ[variable])
    if not path.exists():
        return False
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    part = f".{parallel.attn_tp_rank}" if parallel.attn_tp_size > 1 else ""
    return path.read_text() == f"{parallel.attn_dp_rank}{part}"


def _report(folder):
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sglang_dcp.upstream.attach.install import in_place

    seen = None
    while True:
        patched = sorted(HookRegistry._patched | in_place())
        if patched != seen:
            seen = patched
            target = folder / f"{os.getpid()}.json"
            partial = target.with_suffix(".partial")
            partial.write_text(json.dumps({"process": multiprocessing.current_process().name, "patched": patched}))
            partial.replace(target)
        time.sleep(0.5)
