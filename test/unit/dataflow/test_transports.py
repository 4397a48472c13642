"""The GPU's transports between two processes on the CPU: NCCL's calls over gloo, and bytes staged over the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sglang_dcp.dataflow.transport.base import TransportError
from sglang_dcp.dataflow.transport.gloo import GlooTransport, create_gloo_group
from sglang_dcp.dataflow.transport.host_staged import HostStagedTransport
from sglang_dcp.dataflow.transport.nccl import NcclTransport

SPLITS = [[2, 3], [0, 4]]
"""SPLITS[source][destination]: elements."""


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    group = dist.group.WORLD
    for transport in (NcclTransport(group), HostStagedTransport(GlooTransport(group))):
        for dtype in (torch.float32, torch.bfloat16):
            if dtype == torch.bfloat16 and isinstance(transport, NcclTransport):
                continue  # gloo's limit, not NCCL's
            message = torch.arange(sum(SPLITS[rank]), dtype=dtype) + 10 * rank
            received = [SPLITS[source][rank] for source in range(2)]
            got = transport.all_to_all(message, SPLITS[rank], received, step=1, layer=2, stage="dispatch")
            expected = [[0, 1], []] if rank == 0 else [[2, 3, 4], [10, 11, 12, 13]]
            assert got.tolist() == sum(expected, []) and got.dtype == dtype
    alone = GlooTransport(create_gloo_group(20.0, [range(1), range(1, 2)]))  # a node each: nobody waits for the other
    for _ in range(rank + 1):
        own = torch.arange(3.0) + rank
        assert alone.all_to_all(own, [3], [3], step=1, layer=2, stage="dispatch").equal(own)
    empty = torch.zeros(0)
    assert not NcclTransport(group).all_to_all(empty, [0, 0], [0, 0], step=1, layer=2, stage="return").numel()
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    """This process is instance 0: one start of Python less."""
    other = mp.get_context("spawn").Process(target=work, args=(1, str(tmp_path)))
    other.start()
    try:
        work(0, str(tmp_path))
    finally:
        other.join(timeout=60)
        other.kill()
    assert other.exitcode == 0


def test_a_failure_names_rank_step_layer_and_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("communicator aborted")

    monkeypatch.setattr(dist, "get_rank", lambda group=None: 3)
    monkeypatch.setattr(dist, "all_to_all_single", fail)
    with pytest.raises(TransportError, match="rank 3, step 7, layer 2, return: NCCL failed .communicator aborted"):
        NcclTransport(None).all_to_all(torch.zeros(1), [1], [1], step=7, layer=2, stage="return")  # type: ignore[arg-type]
