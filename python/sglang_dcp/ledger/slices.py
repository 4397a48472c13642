"""Which processes make up an instance: attention tensor parallelism gives it several, its slices, each with a part of every layer's heads.

Every slice keeps the books of its instance whole, and makes its steps with the same slice of all other instances: messages, queries and
partials stay among these. So all slices decide the same, each over its own pool; that they did is checked in every step, against the
columns of slice 0, which are the instance's (Participant.read_columns).
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_dcp.policy.split_limits import Layout


@dataclass(frozen=True, slots=True)
class Slices:
    """Ranks of processes, as SGLang counts them: the slices of an instance follow each other. per_instance: the attention TP size."""

    layout: Layout
    per_instance: int = 1

    def __post_init__(self) -> None:
        if self.per_instance < 1:
            raise ValueError(f"an instance of {self.per_instance} slices has none")

    @property
    def num_ranks(self) -> int:
        return self.layout.num_instances * self.per_instance

    def place(self, rank: int) -> tuple[int, int]:
        """(instance, slice) of a process. ValueError for a rank that the server does not have."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank {rank} is none of {self.layout.num_instances} instances with {self.per_instance} slices each")
        return divmod(rank, self.per_instance)

    def ranks(self, instances: range, slice_: int) -> range:
        """The processes of this slice, of consecutive instances, in their order."""
        return range(instances.start * self.per_instance + slice_, instances.stop * self.per_instance, self.per_instance)

    @property
    def control_groups(self) -> list[range]:
        """Who exchanges messages: of every slice, the processes of all instances."""
        return self._groups([range(self.layout.num_instances)])

    @property
    def exchange_groups(self) -> list[range]:
        """Who exchanges queries, K/V and partials: of every slice, the processes of each of `Layout.groups`."""
        return self._groups(self.layout.groups)

    def _groups(self, groups: list[range]) -> list[range]:
        return [self.ranks(instances, slice_) for slice_ in range(self.per_instance) for instances in groups]
