"""N processes connected by CUDA IPC: on one GPU, where they are time-sliced, so this proves correctness only, and on a GPU each."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as multiprocessing

from testing.kernels.exchange_member import member

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("num_instances", "num_gpus"), [(3, 1), (2, 2)])
def test_processes_over_cuda_ipc(library, num_instances: int, num_gpus: int) -> None:
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs")
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(num_instances):
        ours, theirs = context.Pipe()
        process = context.Process(target=member, args=(rank, num_instances, num_gpus, theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)
    handles = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send(handles)
    for rank, pipe in enumerate(pipes):
        assert pipe.poll(240), f"instance {rank} did not finish"
    results = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send("done")
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert results == [(0.0, {})] * num_instances
