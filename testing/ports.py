"""Ports of a server on this machine, and of the further process trees of one that has several nodes."""

from __future__ import annotations

import itertools
import os
import socket

RENDEZVOUS_OFFSET, FOLLOWER_OFFSET = 100, 200
"""Of a server of several nodes: --dist-init-addr of all of them, and the health endpoint of the first node but one."""
PORT_OFFSETS = (0, 13, *range(RENDEZVOUS_OFFSET, RENDEZVOUS_OFFSET + 21), *range(FOLLOWER_OFFSET, FOLLOWER_OFFSET + 4), *range(233, 250))
"""What a server with attention data parallelism binds besides its port: handshake, and sockets of the ranks from +233 on."""


def find_free_port(first: int = 15000, last: int = 21000) -> int:
    """A port whose companions (PORT_OFFSETS) are free too, below the ranges that SGLang and the kernel draw from."""
    return find_free_ports(1, first, last)[0]


def find_free_ports(count: int, first: int = 15000, last: int = 21000, step: int = 300) -> list[int]:
    """As many, for servers that start together. The search begins at a place of this process's own: two runs that look at once would find
    the same free ports."""
    ports = list(range(first, last, step))
    begin = os.getpid() % len(ports)
    found = itertools.islice(filter(_is_free_with_companions, ports[begin:] + ports[:begin]), count)
    if len(free := list(found)) < count:
        raise RuntimeError(f"no {count} free ports between {first} and {last} with free ports at offsets {PORT_OFFSETS}")
    return free


def _is_free_with_companions(port: int) -> bool:
    return all(_is_free(port + offset) for offset in PORT_OFFSETS)


def _is_free(port: int) -> bool:
    """By the rule that servers bind by: what waits for the rest of a closed connection of an ended server is no hindrance."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
