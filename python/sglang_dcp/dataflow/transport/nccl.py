"""Exchange over a NCCL process group: the baseline of the GPU transports, and the one that reaches across nodes.

Sends and receives of a call form one NCCL group, ordered with the current stream on both sides; the host does not wait. A peer that
never comes is noticed by NCCL's watchdog, which ends the process after the group's timeout; the control messages of the next step
(gloo) time out beside it and name the rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from sglang_dcp.dataflow.transport.collective import CollectiveTransport, create_group


class NcclTransport(CollectiveTransport):
    """Wraps a NCCL group, made by `create_nccl_group`. Messages are device tensors."""

    failure = "NCCL failed"


def create_nccl_group(timeout_seconds: float, groups: Sequence[range]) -> dist.ProcessGroup:
    """This rank's NCCL group of `groups`. Every rank must call it."""
    return create_group("nccl", timeout_seconds, groups)
