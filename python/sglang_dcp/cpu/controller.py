"""The router process polls its socket without pause, which takes a whole core: half of a small machine."""

from __future__ import annotations

from typing import Any

POLL_MILLISECONDS = 20


def event_loop(controller: Any) -> None:
    """REPLACE DataParallelController.event_loop: waits for the socket instead of spinning on it."""
    import zmq
    from sglang.srt.managers.io_struct import sock_recv

    while True:
        controller.soft_watchdog.feed()
        if controller.recv_from_tokenizer.poll(POLL_MILLISECONDS):
            try:
                request = sock_recv(controller.recv_from_tokenizer, flags=zmq.NOBLOCK)
            except zmq.ZMQError:
                continue
            controller._request_dispatcher(request)
