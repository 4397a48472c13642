"""Which processes are an instance's, and which exchange with each other."""

from __future__ import annotations

import pytest

from sglang_dcp.ledger.slices import Slices
from sglang_dcp.policy.split_limits import Layout

LAYOUTS = [Layout(2, 2), Layout(4, 2), Layout(4, 2, crosses=True), Layout(5, 3), Layout(72, 8)]


@pytest.mark.parametrize("per_instance", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_process_has_a_place_and_one_group_of_each_kind(layout: Layout, per_instance: int) -> None:
    slices = Slices(layout, per_instance)
    places = [slices.place(rank) for rank in range(slices.num_ranks)]
    assert places == sorted(set(places)) and len(places) == layout.num_instances * per_instance
    for groups in (slices.control_groups, slices.exchange_groups):
        assert sorted(rank for group in groups for rank in group) == list(range(slices.num_ranks))
    for group in slices.control_groups:
        assert [slices.place(rank)[0] for rank in group] == list(range(layout.num_instances))
        assert len({slices.place(rank)[1] for rank in group}) == 1
    for group in slices.exchange_groups:
        # A rank's place in its process group is its instance's place among those that exchange: splits are counted by it.
        instances = [slices.place(rank)[0] for rank in group]
        assert instances == list(layout.group(instances[0])) and len({slices.place(rank)[1] for rank in group}) == 1


def test_two_instances_of_two_slices() -> None:
    slices = Slices(Layout(2, 2), 2)
    assert [slices.place(rank) for rank in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [list(group) for group in slices.exchange_groups] == [[0, 2], [1, 3]]
    assert [list(group) for group in Slices(Layout(4, 2), 2).exchange_groups] == [[0, 2], [4, 6], [1, 3], [5, 7]]


def test_one_slice_is_the_layout_itself() -> None:
    layout = Layout(6, 2)
    slices = Slices(layout)
    assert slices.exchange_groups == layout.groups and slices.control_groups == [range(6)] and slices.place(4) == (4, 0)


def test_what_is_not_there_has_no_place() -> None:
    with pytest.raises(ValueError, match="rank 4 is none of 2 instances with 2 slices each"):
        Slices(Layout(2, 2), 2).place(4)
    with pytest.raises(ValueError, match="an instance of 0 slices has none"):
        Slices(Layout(2, 2), 0)
