"""A plugin of tests and by-hand runs alone, for a prefill server: it stops in the middle of a transfer when it is told to, and counts what
it sends; all by files of one folder. Where SGLANG_PLUGINS names it alone, the server is stock SGLang with what a CPU needs.

Found by SGLang through the folder beside this file when that is on PYTHONPATH.
"""

import multiprocessing
import os
import time
from pathlib import Path

NAME, FOLDER_VARIABLE = "dyncp_transfer_probe", "DYNCP_TRANSFER_PROBE"
HOLD, HELD, SENT = "hold", "held", "sent"
"""While HOLD is there, the server stops after a chunk, and makes HELD. SENT: a line per call of Mooncake's, bytes of K/V and of a page."""


def register():
    if FOLDER_VARIABLE not in os.environ:
        return
    is_child = multiprocessing.parent_process() is not None
    if os.environ.get("SGLANG_PLUGINS") == NAME:
        _run_on_a_cpu(is_child)
    if not is_child:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    manager = "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager"
    # Every send of K/V comes here, whoever lists its pages.
    HookRegistry.register(f"{manager}._transfer_data", _count_and_hold, HookType.AFTER)


def _run_on_a_cpu(is_child):
    from sglang_dcp.cpu.hooks import CPU_HOOKS
    from sglang_dcp.upstream.attach.install import install
    from sglang_dcp.upstream.disaggregation.sending import read_indices_on_host

    install(CPU_HOOKS)
    if is_child:
        read_indices_on_host()


def _folder():
    return Path(os.environ[FOLDER_VARIABLE])


def _count_and_hold(result, manager, session, blocks, *args, **kwargs):
    ours = manager.kv_args
    pools = [range(start, start + size) for start, size in zip(ours.kv_data_ptrs, ours.kv_data_lens, strict=True)]
    sent = sum(int(length) for source, _, length in blocks if any(int(source) in pool for pool in pools))
    with (_folder() / SENT).open("a") as file:
        file.write(f"{sent} {sum(ours.kv_item_lens)}\n")
    while (_folder() / HOLD).exists():
        (_folder() / HELD).touch()
        time.sleep(0.05)
    return result
