"""Children of a server are forked from one process that has imported what they all import, instead of importing it each.

A process of SGLang imports for 15 s of CPU time and four instances are seven of them, so on two cores a test waits a minute for every
server. `multiprocessing` has what it takes, its fork server; SGLang asks for `spawn` by name, so this gives it that under the name. A child
begins as a spawned one does: with the creator's environment, arguments and main module, and no state but loaded modules. Unlike one it is
the fork server's child, which passes on the signal by which a failing scheduler ends its parent.
"""

import gc
import multiprocessing
import os
import signal
import sys
from multiprocessing import context, forkserver, popen_forkserver, spawn

import setproctitle

PRELOADED = (
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.data_parallel_controller",
    "sglang.srt.models.registry",
)
MAIN_MODULE = "sglang.launch_server"
FORK_SERVER = "from multiprocessing.forkserver import main"
"""In the command by which Python starts one."""

_given_preparation, _prepare = spawn.get_preparation_data, spawn.prepare


def _with_environment(name):
    return _given_preparation(name) | {"environment": dict(os.environ)}


def _prepare_with_environment(data):
    environment = data.pop("environment", None)
    if environment is not None:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
    _prepare(data)


def _pass_on(number, _frame):
    os.kill(os.getppid(), number)


def install():
    """In every process of a server."""
    spawn.get_preparation_data, spawn.prepare = _with_environment, _prepare_with_environment
    context.SpawnProcess._Popen = staticmethod(popen_forkserver.Popen)
    words = sys.orig_argv
    if any(FORK_SERVER in word for word in words):
        signal.signal(signal.SIGQUIT, _pass_on)
        os.register_at_fork(before=gc.freeze, after_in_child=lambda: signal.signal(signal.SIGQUIT, signal.SIG_DFL))
        setproctitle.getproctitle()  # finds the place of a title, which it does not once the environment has moved
    elif MAIN_MODULE in words:
        multiprocessing.set_forkserver_preload(list(PRELOADED))
        forkserver.ensure_running()  # at once, so that it imports on one core while this process does on another
