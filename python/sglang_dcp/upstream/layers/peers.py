"""Whether the instances of a node can map each other's memory, and the exchange of the handles that let them."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

MOST_PEERS = 16  # sgl_kernel_dcp.shapes.MAX_INSTANCES, readable without the kernel package; a test holds the two together


@dataclass(frozen=True)
class Place:
    """Where an instance runs: its host, its GPU, and the GPUs of the host whose memory it can map (its own included).

    has_kernels: sgl-kernel-dcp can be imported there.
    """

    host: str
    gpu: str
    reachable: tuple[str, ...]
    has_kernels: bool = True


def own_place() -> Place:
    own = torch.cuda.current_device()
    names = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    reachable = [name for index, name in enumerate(names) if index == own or torch.cuda.can_device_access_peer(own, index)]
    return Place(socket.gethostname(), names[own], tuple(reachable), importlib.util.find_spec("sgl_kernel_dcp") is not None)


def find_obstacle(places: Sequence[Place], groups: Sequence[range]) -> str | None:
    """Why the instances (by rank) of some exchange group cannot exchange over peer memory, or None when those of every one can.

    All instances get the same answer: a step runs as a graph on all of them, or on none.
    """
    return next((obstacle for group in groups if (obstacle := _find_obstacle(places, group)) is not None), None)


def _find_obstacle(places: Sequence[Place], group: range) -> str | None:
    if len(group) > MOST_PEERS:
        return f"{len(group)} instances exchange rows, the kernels serve {MOST_PEERS} (--dyncp-node-size)"
    for rank in group:
        place = places[rank]
        if not place.has_kernels:
            return f"sgl-kernel-dcp is not installed where instance {rank} runs"
        for peer in group:
            other = places[peer]
            if place.host != other.host:
                return f"instances {rank} and {peer} run on different hosts"
            if other.gpu not in place.reachable:
                return f"instance {rank} cannot map the memory of instance {peer}'s GPU"
    return None


def num_sharing(places: Sequence[Place], rank: int) -> int:
    """Instances on this instance's GPU, itself included."""
    return sum(place.gpu == places[rank].gpu for place in places)


def tell_everybody(own: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's object, by rank. Every rank calls it."""
    everybody: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everybody, own, group=group)
    return everybody
