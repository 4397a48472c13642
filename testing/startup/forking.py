"""A process that has imported SGLang and forks servers: `python -m forking SOCKET`, a file descriptor
(testing/forked.py asks).

A process of SGLang imports for 20 s of CPU time and four instances are seven of them, so on two cores a test waits a minute for every
server that starts as users start it. Here the server's first process is a fork of this one. So is its fork server, from which
`multiprocessing` forks the others: SGLang asks for `spawn` by name, and gets that under the name. Each begins as it does with users, with
the creator's environment, arguments and main module and no state but loaded modules, except that schedulers are the fork server's
children, which passes on the signal by which a failing scheduler ends its parent.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from multiprocessing import connection, context, forkserver, popen_forkserver, spawn

import setproctitle

IMPORTED = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.data_parallel_controller",
    "sglang.srt.models.registry",
)
MOST_BYTES = 1 << 16

_given_preparation, _prepare = spawn.get_preparation_data, spawn.prepare


def main(control):
    """Forks one process per message of `control`: its command and environment, its log, and a socket that is told its pid and then its exit
    status. In a fork, returns the message; here None, once the other end is closed and all forks have ended."""
    for name in IMPORTED:
        importlib.import_module(name)
    setproctitle.getproctitle()  # finds the place of a title, which it does not once the environment has moved
    gc.collect()
    gc.freeze()
    with selectors.DefaultSelector() as waiting, control:
        waiting.register(control, selectors.EVENT_READ)
        while waiting.get_map():
            for key, _ in waiting.select():
                if key.fileobj is not control:
                    waiting.unregister(key.fileobj)
                    _tell_end(key.fileobj, *key.data)
                    continue
                message, files, *_ = socket.recv_fds(control, MOST_BYTES, 2)
                if not message:
                    waiting.unregister(control)
                    continue
                log, answers = files
                pid = os.fork()
                if pid == 0:
                    for other in waiting.get_map().values():
                        if other.fileobj is not control:
                            os.close(other.fileobj)
                            other.data[1].close()
                    os.close(answers)
                    _begin(log)
                    return json.loads(message)
                os.close(log)
                channel = socket.socket(fileno=answers)
                channel.send(str(pid).encode())
                waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, channel))
    return None


def _tell_end(pidfd, pid, channel):
    """Sends the exit status of the process as subprocess.Popen.returncode tells it."""
    os.close(pidfd)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with channel, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked may have gone
        channel.send(str(code).encode())


def _begin(log):
    """A group of its own, with its own input and output."""
    os.setsid()
    for file, place in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
        os.dup2(file, place)
    _fork_fork_server()
    os.execve = _execute


def run(command, environment):
    """Goes on as `python -m MODULE ...`."""
    _set_environment(environment)
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [folder for folder in folders if folder and folder not in sys.path]
    _python, _flag, module, *arguments = command
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _execute(_program, command, environment):
    run(command, environment)
    sys.exit()


def _set_environment(environment):
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _fork_fork_server():
    """In place of what `multiprocessing` would start as a new program: the same, as a fork, before this process has threads."""
    server = forkserver._forkserver
    listener = socket.socket(socket.AF_UNIX)
    address = connection.arbitrary_address("AF_UNIX")
    listener.bind(address)
    listener.listen()
    alive, kept = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(kept)
        signal.signal(signal.SIGQUIT, lambda number, _frame: os.kill(os.getppid(), number))
        os.register_at_fork(before=gc.freeze, after_in_child=lambda: signal.signal(signal.SIGQUIT, signal.SIG_DFL))
        spawn.prepare = _prepare_with_environment
        forkserver.main(listener.detach(), alive, [])
        os._exit(0)
    listener.close()
    os.close(alive)
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, kept, pid
    spawn.get_preparation_data = _with_environment
    context.SpawnProcess._Popen = staticmethod(popen_forkserver.Popen)


def _with_environment(name):
    return _given_preparation(name) | {"environment": dict(os.environ)}


def _prepare_with_environment(data):
    _set_environment(data.pop("environment"))
    _prepare(data)


if __name__ == "__main__":
    if (asked := main(socket.socket(fileno=int(sys.argv[1])))) is not None:
        run(**asked)
