"""Compares a served run with the policy on its own: same arrivals, same placements?

    python -m benchmark.serving.soak --part short --record FILE        (or SGLANG_DYNCP_PLACEMENT_LOG=FILE sglang-dcp serve ...)
    python -m benchmark.simulate.replay FILE

First on the loads that the router saw and wrote down: there the same policy code must choose the same placement for every request, else
the exit code is 1. Then on loads as the simulator keeps them, what was placed and has not finished: the router reads SGLang's snapshots,
which come later and count decoded tokens, so the second share tells how far a simulated cluster's view is from a served one's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmark.serving.provenance import provenance
from benchmark.simulate.cluster import Cluster, SimulatedRequest
from sglang_dcp.policy.cost_model import CostModel, load_cost_model
from sglang_dcp.policy.placement import make_policy
from sglang_dcp.policy.split_limits import Layout, SplitRule
from sglang_dcp.policy.types import InstanceLoad, Placement, PlacementPolicy, PlacementRequest


@dataclass(frozen=True)
class ObservedRequest:
    """One request of a served run, in the router's order. `finish` is when the router saw it leave, None when it never did."""

    arrival: float
    prompt_tokens: int
    max_new_tokens: int
    placement: Placement
    finish: float | None = None
    expected_new_tokens: int | None = None
    degree: int | None = None
    home: int | None = None


@dataclass(frozen=True)
class ReplayResult:
    """`differences` holds (index, observed, chosen) of every request that the policy places otherwise."""

    num_requests: int
    differences: tuple[tuple[int, Placement, Placement], ...]

    @property
    def share_equal(self) -> float:
        return 1 - len(self.differences) / self.num_requests if self.num_requests else 1.0

    @property
    def share_of_equal_degree(self) -> float:
        others = sum(observed.degree != chosen.degree for _, observed, chosen in self.differences)
        return 1 - others / self.num_requests if self.num_requests else 1.0


def replay(
    observed: Sequence[ObservedRequest],
    policy: PlacementPolicy,
    *,
    num_instances: int,
    instances_per_node: int,
    pool_tokens: int,
    page_size: int,
) -> ReplayResult:
    """Places every request on the load that the observed placements before it left. Growth while decoding is not replayed.

    After a difference the observed placement is booked, so that one difference does not cause the next.
    Raises ValueError when arrivals are not in order.
    """
    if any(later.arrival < earlier.arrival for earlier, later in zip(observed, observed[1:], strict=False)):
        raise ValueError("observed requests must be in order of arrival")
    limits = SplitRule(num_instances).limits(pool_tokens // page_size, Layout(num_instances, instances_per_node))
    cluster = Cluster(limits, page_size)
    present: list[tuple[float, SimulatedRequest]] = []
    differences = []
    for index, item in enumerate(observed):
        for finish, request in [entry for entry in present if entry[0] <= item.arrival]:
            cluster.withdraw(request)
            present.remove((finish, request))
        expected = item.max_new_tokens if item.expected_new_tokens is None else item.expected_new_tokens
        wanted = PlacementRequest(item.prompt_tokens, expected, item.max_new_tokens, item.degree, item.home)
        chosen = policy.place(wanted, cluster.loads, page_size)
        if chosen != item.placement:
            differences.append((index, item.placement, chosen))
        request = SimulatedRequest(index, item.arrival, item.prompt_tokens, item.max_new_tokens)
        cluster.promise(request, item.placement)
        if item.finish is not None:
            present.append((item.finish, request))
    return ReplayResult(len(observed), tuple(differences))


@dataclass(frozen=True)
class RecordedRun:
    """A file of `observe/placement_log.py`. `loads[i]` is what the router saw before it placed `requests[i]`."""

    cluster: dict[str, Any]
    requests: tuple[ObservedRequest, ...]
    loads: tuple[tuple[InstanceLoad, ...], ...]

    def policy(self) -> PlacementPolicy:
        """The policy of the server, with a state of its own."""
        options = {key: value for key, value in self.cluster.items() if key not in ("policy", "cost_model", "constants")}
        constants = self.cluster.get("constants")
        cost = CostModel(**constants) if constants else load_cost_model(self.cluster["cost_model"], self.cluster["num_instances"])
        return make_policy(self.cluster["policy"], cost_model=cost, **options)


def read_record(path: Path) -> RecordedRun:
    """Raises ValueError naming the line of an entry that is not one."""
    cluster: dict[str, Any] | None = None
    requests: list[ObservedRequest] = []
    loads: list[tuple[InstanceLoad, ...]] = []
    latest: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            if "cluster" in entry:
                cluster = entry["cluster"]
            elif "finished" in entry:
                # A name may return in a later run; it means the latest request of that name. One refused has no placement.
                if entry["finished"] in latest:
                    index = latest[entry["finished"]]
                    requests[index] = replace(requests[index], finish=entry["time"])
            else:
                prompt, expected, most, degree, home = entry["request"]
                placement = Placement(entry["placement"][0], tuple(entry["placement"][1]), tuple(entry["placement"][2]))
                latest[entry["rid"]] = len(requests)
                loads.append(tuple(InstanceLoad(rank, *values) for rank, values in enumerate(entry["loads"])))
                requests.append(
                    ObservedRequest(entry["time"], prompt, most, placement, expected_new_tokens=expected, degree=degree, home=home)
                )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not an entry of a placement log: {error!r}") from error
    if cluster is None or not requests:
        raise ValueError(f"{path} holds no placements: was it recorded with a policy other than local?")
    return RecordedRun(cluster, tuple(requests), tuple(loads))


def replay_on_recorded_loads(run: RecordedRun) -> ReplayResult:
    """Every request on the very loads that the router saw."""
    policy, differences = run.policy(), []
    for index, (item, loads) in enumerate(zip(run.requests, run.loads, strict=True)):
        expected = item.max_new_tokens if item.expected_new_tokens is None else item.expected_new_tokens
        wanted = PlacementRequest(item.prompt_tokens, expected, item.max_new_tokens, item.degree, item.home)
        chosen = policy.place(wanted, list(loads), run.cluster["page_size"])
        if chosen != item.placement:
            differences.append((index, item.placement, chosen))
    return ReplayResult(len(run.requests), tuple(differences))


def replay_on_simulated_loads(run: RecordedRun) -> ReplayResult:
    """Every request on what the simulator's cluster holds at its arrival."""
    first = run.loads[0]
    per_node = sum(load.node == first[0].node for load in first)
    return replay(
        run.requests,
        run.policy(),
        num_instances=len(first),
        instances_per_node=per_node,
        pool_tokens=min(load.kv_capacity for load in first),
        page_size=run.cluster["page_size"],
    )


def main(arguments: list[str] | None = None) -> int:
    """Prints both comparisons as JSON; 1 when a placement differs on the recorded loads, 2 for a bad file."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.simulate.replay", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path, help="file written by soak --record or SGLANG_DYNCP_PLACEMENT_LOG")
    parser.add_argument("--out", type=Path, help="also write the result here")
    args = parser.parse_args(arguments)
    try:
        run = read_record(args.record)
    except (OSError, ValueError) as error:
        print(f"benchmark.simulate.replay: {error}", file=sys.stderr)
        return 2
    exact, simulated = replay_on_recorded_loads(run), replay_on_simulated_loads(run)
    command = f"python -m benchmark.simulate.replay {args.record.name}"
    report = provenance(command) | {
        "requests": exact.num_requests,
        "split": sum(item.placement.degree > 1 for item in run.requests),
        "equal_on_recorded_loads": exact.share_equal,
        "equal_on_simulated_loads": simulated.share_equal,
        "equal_degree_on_simulated_loads": simulated.share_of_equal_degree,
        "differences_on_recorded_loads": [
            {"index": index, "served": str(served), "policy": str(chosen)} for index, served, chosen in exact.differences[:10]
        ],
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    return int(bool(exact.differences))


if __name__ == "__main__":
    sys.exit(main())
