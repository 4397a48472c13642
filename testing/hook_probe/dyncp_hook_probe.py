"""A plugin of the tests alone: writes which SGLang targets are patched in this process, for as long as that changes.

Found by SGLang through the folder beside this file when a test puts this folder on PYTHONPATH.
"""

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

FOLDER_VARIABLE = "DYNCP_HOOK_PROBE"


def register():
    threading.Thread(target=_report, args=(Path(os.environ[FOLDER_VARIABLE]),), daemon=True).start()


def _report(folder):
    from sglang.srt.plugins.hook_registry import HookRegistry

    seen = None
    while True:
        patched = sorted(HookRegistry._patched)
        if patched != seen:
            seen = patched
            target = folder / f"{os.getpid()}.json"
            partial = target.with_suffix(".partial")
            partial.write_text(json.dumps({"process": multiprocessing.current_process().name, "patched": patched}))
            partial.replace(target)
        time.sleep(0.5)
