"""A plugin of the tests alone: writes which SGLang targets are patched in this process, for as long as that changes; and makes an instance
raise when a test says so, by a file.

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
"""Names a file; the instance whose rank it holds raises in its next forward pass."""


def register():
    if RAISE_VARIABLE in os.environ:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.run_batch", _raise_when_told, HookType.BEFORE)
    if FOLDER_VARIABLE not in os.environ:
        return
    threading.Thread(target=_report, args=(Path(os.environ[FOLDER_VARIABLE]),), daemon=True).start()


def _raise_when_told(scheduler, *args, **kwargs):
    path = Path(os.environ[RAISE_VARIABLE])
    if path.exists() and path.read_text() == str(scheduler.load_snapshot_writer.dp_rank):
        raise RuntimeError("told to raise by a test")


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
