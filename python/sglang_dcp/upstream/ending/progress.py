"""Notices that no instance makes steps any more. Pure: times and reports come from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepReport:
    """One instance's latest load snapshot. stamp: when it was written; step: of the step protocol; is_warm: it has run a prefill and a
    decode, so the kernels of both are compiled."""

    rank: int
    stamp: float
    step: int
    is_warm: bool


class ProgressWatch:
    """Tells when requests are open and no report has moved for `limit_s`.

    Kernels that are compiled on first use take minutes in which nothing moves, so it judges nothing before every one of the
    `num_instances` instances is warm.
    """

    def __init__(self, limit_s: float, num_instances: int) -> None:
        self._limit_s = limit_s
        self._num_instances = num_instances
        self._is_armed = False
        self._stamps: tuple[float, ...] = ()
        self._since: float | None = None

    def is_hung(self, now: float, reports: Sequence[StepReport], *, has_work: bool) -> bool:
        """now: any clock in seconds that never goes back. has_work: some request is with the instances and nothing is paused."""
        self._is_armed = self._is_armed or (len(reports) == self._num_instances and all(report.is_warm for report in reports))
        stamps = tuple(report.stamp for report in reports)
        if not self._is_armed or not has_work or stamps != self._stamps or self._since is None:
            self._stamps = stamps
            self._since = now if has_work else None
            return False
        return now - self._since >= self._limit_s


def describe_steps(reports: Sequence[StepReport]) -> str:
    """Where every instance stands, as in "instance 0 at step 51, instance 1 at step 50"."""
    return ", ".join(f"instance {report.rank} at step {report.step}" for report in reports)
