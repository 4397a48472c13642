"""SGLang's HTTP application of a tokenizer worker (--tokenizer-worker-num): the same one, behind our touch points.

SGLang loads no plugins in these processes. It lets an environment variable name the module that their web server imports, and that is
this one (tokenizer_workers.py): importing it installs what the main process has where there is one worker.
"""

from __future__ import annotations

from sglang_dcp.upstream.attach.install import install, verify_installed
from sglang_dcp.upstream.attach.main_hooks import DYNCP_MAIN_HOOKS

install(DYNCP_MAIN_HOOKS)
verify_installed()

from sglang.srt.entrypoints.http_server import app  # noqa: E402 - it is served with the hooks in place

__all__ = ["app"]
