"""A plugin of tests and by-hand runs alone, for a prefill server: it stops in the middle of a transfer when it is told to, counts what it
sends, and can be made to send as one without this package does. All by files of one folder.

Found by SGLang through the folder beside this file when that is on PYTHONPATH.
"""

import multiprocessing
import os
import time
from pathlib import Path

FOLDER_VARIABLE = "DYNCP_TRANSFER_PROBE"
HOLD, HELD, SEND_ALL, SENT = "hold", "held", "send_all", "sent"
"""While HOLD is there, the server stops after a chunk, and makes HELD. SEND_ALL, before it starts: every page to every shard. SENT: bytes,
a line per call of Mooncake's."""


def register():
    if FOLDER_VARIABLE not in os.environ or multiprocessing.parent_process() is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    manager = "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager"
    # Not send_kvcache: of two plugins that hook one target, SGLang's registry applies the first, and this package's own would be dropped.
    HookRegistry.register(f"{manager}._transfer_data", _count_and_hold, HookType.AFTER)
    if (_folder() / SEND_ALL).exists():
        from sglang_dcp.upstream.disaggregation import sending

        sending.PADDING_PAGE = -1


def _folder():
    return Path(os.environ[FOLDER_VARIABLE])


def _count_and_hold(result, manager, session, blocks, *args, **kwargs):
    with (_folder() / SENT).open("a") as file:
        file.write(f"{sum(length for _, _, length in blocks)}\n")
    while (_folder() / HOLD).exists():
        (_folder() / HELD).touch()
        time.sleep(0.05)
    return result
