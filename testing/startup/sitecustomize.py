"""On the path of every server that testing/server.py starts: Python runs it before anything else, in each process.

The processes of a server outnumber the cores of a small machine and wait for each other many times in a step. As batch work, whoever is
woken does not interrupt who runs: on two cores of a virtual machine four instances decode 1.6 times as fast.

A process of SGLang makes 1.2 million objects while it imports, and looking for garbage after every 700 takes a quarter of that time. So it
looks rarely until most of them are there, then as ever.
"""

import gc
import os

WHILE_IMPORTING, NUM_COLLECTIONS = 100_000, 10
DEFAULT = gc.get_threshold()
_seen = []


def _count(phase, _info):
    if phase != "stop":
        return
    _seen.append(None)
    if len(_seen) == NUM_COLLECTIONS:
        gc.callbacks.remove(_count)
        gc.freeze()
        gc.set_threshold(*DEFAULT)


gc.set_threshold(WHILE_IMPORTING, 50, 50)
gc.callbacks.append(_count)
os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
