"""CUDA graphs captured while nothing of earlier ones is destroyed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def collector_off() -> Iterator[None]:
    """Collects garbage first, then none inside."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """torch.cuda.graph(graph, **options) for a process in which earlier graphs lie in reference cycles, as those of a test's instances do.

    Such a graph is destroyed by the collector, whenever that comes: in the midst of a capture CUDA does not allow it, and the capture is
    invalidated (cudaErrorStreamCaptureInvalidated). torch collects ahead of a capture only where it is asked to, and never keeps the
    collector off.
    """
    with collector_off(), torch.cuda.graph(graph, **options):
        yield
