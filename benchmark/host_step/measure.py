"""One measurement of benchmark/host_step, in a process of its own: JSON on standard output.

    python -m benchmark.host_step.measure [--load steady|changing] [--steps 300] [--dirty-mb 24] [--profile]

The caches are filled with other things before every step, as a server's layers, kernels' launches and other threads do: our code runs once
per step, and where it is called in a loop it takes a quarter of what it takes there. The first instance of a step is measured; the others
find our code in the caches.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import statistics
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from benchmark.host_step.scene import PAGE_SIZE, Scene, neighbour
from sglang_dcp.upstream.observe.host_clock import HostClock

NUM_INSTANCES, ROWS, SHARDED, PROMPT = 2, 128, 32, 256
"""As benchmark/gpu_runtime has it: HOST_LOAD."""
WARM_STEPS, STEPS_PER_CHANGE = 100, 4


class StepClock(HostClock):
    """Also adds up a step as it runs: HostClock's ends when all instances have met."""

    step_seconds = 0.0

    def spent(self, part: str, seconds: float) -> None:
        self.step_seconds += seconds
        super().spent(part, seconds)


def change(scene: Scene, number: int) -> None:
    """The oldest request of every home leaves, another of its kind joins."""
    for home in scene.instances:
        sharded = scene.leave(home, 0)
        scene.join(home, PROMPT + number % PAGE_SIZE, sharded=sharded)


def measure(load: str, steps: int, dirty_mb: int, profile: cProfile.Profile | None) -> dict[str, Any]:
    """The first instance's host clock, and the yardstick beside it: median microseconds of a few of torch's small operations."""
    torch.set_num_threads(1)
    scene = Scene(NUM_INSTANCES, ROWS, SHARDED, PROMPT)
    for _ in range(WARM_STEPS):
        scene.step()
    first, dirt, yardstick = scene.instances[0], np.zeros(dirty_mb << 17), []
    clock = first.runtime.host_clock = StepClock()
    changed: list[float] = []
    gc.collect()
    gc.disable()
    for number in range(steps):
        if load == "changing" and number % STEPS_PER_CHANGE == 0:
            change(scene, number)
        dirt += 1
        began = time.perf_counter()
        neighbour(first.batch)
        yardstick.append(time.perf_counter() - began)
        clock.step_seconds = 0.0
        with profile or nullcontext():
            scene.step()
        if load == "changing" and number % STEPS_PER_CHANGE == 0:
            changed.append(clock.step_seconds)
    found = clock.summary()["sharded"] | {"yardstick_us": round(statistics.median(yardstick) * 1e6, 1)}
    return found | ({"changed_p50_us": round(statistics.median(changed) * 1e6, 1)} if changed else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", choices=("steady", "changing"), default="steady")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--dirty-mb", type=int, default=24, help="what is written before every step; 0: our code stays in the caches")
    parser.add_argument("--profile", action="store_true", help="cProfile's table in place of times")
    args = parser.parse_args()
    profile = cProfile.Profile() if args.profile else None
    found = measure(args.load, args.steps, args.dirty_mb, profile)
    if profile is None:
        print(json.dumps(found))
    else:
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
