"""Ports of a server on this machine, and of the further process trees of one that has several nodes."""

from __future__ import annotations

import os
import socket

RENDEZVOUS_OFFSET, FOLLOWER_OFFSET = 100, 200
"""Of a server of several nodes: --dist-init-addr of all of them, and the health endpoint of the first node but one."""
PORT_OFFSETS = (0, 13, *range(RENDEZVOUS_OFFSET, RENDEZVOUS_OFFSET + 21), *range(FOLLOWER_OFFSET, FOLLOWER_OFFSET + 4), *range(233, 250))
"""What a server with attention data parallelism binds besides its port: handshake, and sockets of the ranks from +233 on."""


def find_free_port(first: int = 15000, last: int = 21000, step: int = 300) -> int:
    """A port whose companions (PORT_OFFSETS) are free too, below the ranges that SGLang and the kernel draw from.

    The search begins at a place of this process's own: two runs that look at once would find the same free port.
    """
    ports = list(range(first, last, step))
    begin = os.getpid() % len(ports)
    for port in ports[begin:] + ports[:begin]:
        if all(_is_free(port + offset) for offset in PORT_OFFSETS):
            return port
    raise RuntimeError(f"no free port between {first} and {last} with free ports at offsets {PORT_OFFSETS}")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
