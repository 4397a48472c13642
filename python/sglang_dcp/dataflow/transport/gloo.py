"""Exchange over a gloo process group: the CPU transport, and the plain baseline for the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from sglang_dcp.dataflow.transport.collective import CollectiveTransport, create_group


class GlooTransport(CollectiveTransport):
    """Wraps a gloo group, made by `create_gloo_group`."""

    failure = "peers did not answer"


def create_gloo_group(timeout_seconds: float, groups: Sequence[range]) -> dist.ProcessGroup:
    """This rank's gloo group of `groups`. Every rank must call it. A wait longer than the timeout raises TransportError."""
    return create_group("gloo", timeout_seconds, groups)
