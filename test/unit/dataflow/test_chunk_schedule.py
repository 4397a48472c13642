"""Which steps a FlashInfer schedule serves, and that one which cannot be read serves none."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sglang_dcp.dataflow.graph.chunk_schedule import CHUNK_TOKENS_FIELD, OUTPUT_INDPTR_FIELD, ChunkSchedule

PAGE_SIZE, CHUNK_AT, INDPTR_AT = 64, 512, 64


def planned(counts: np.ndarray, pages_per_chunk: int) -> SimpleNamespace:
    """A wrapper as it is behind `plan`."""
    host = torch.zeros(1024, dtype=torch.uint8)
    words = host.view(torch.int32)
    words[CHUNK_AT // 4] = pages_per_chunk * PAGE_SIZE
    begin = np.concatenate([[0], np.maximum(1, -(-counts // pages_per_chunk)).cumsum()])
    words[INDPTR_AT // 4 : INDPTR_AT // 4 + len(begin)] = torch.from_numpy(begin.astype(np.int32))
    info = [0] * 15
    info[OUTPUT_INDPTR_FIELD], info[CHUNK_TOKENS_FIELD] = INDPTR_AT, CHUNK_AT
    return SimpleNamespace(_plan_info=info, _pin_memory_int_workspace_buffer=host)


def test_serves_until_a_row_has_another_number_of_chunks() -> None:
    counts = np.array([1, 7, 8, 9, 0, 33])
    schedule = ChunkSchedule(PAGE_SIZE)
    assert not schedule.serves(counts)
    schedule.read(planned(counts, 8), counts)
    assert schedule.serves(counts)
    assert schedule.serves(np.array([8, 8, 8, 16, 1, 40])), "rows grew within their chunks"
    for grown in ([1, 7, 9, 9, 0, 33], [1, 7, 8, 9, 0, 41], [9, 7, 8, 9, 0, 33]):
        assert not schedule.serves(np.array(grown))
    assert not schedule.serves(np.array([1, 7, 8, 8, 0, 33])), "a shorter row has a chunk less"
    assert not schedule.serves(counts[:-1])


def test_the_first_row_may_have_an_empty_chunk_behind_its_end() -> None:
    counts = np.array([4, 7, 8])
    schedule = ChunkSchedule(PAGE_SIZE)
    schedule.read(planned(np.array([9, 7, 8]), 8), counts)
    assert schedule.serves(counts) and schedule.serves(np.array([8, 8, 8])) and not schedule.serves(np.array([9, 7, 8]))


def test_rows_that_begin_a_page_begin_a_chunk_now_and_then() -> None:
    counts = np.array([1, 7, 8, 15])
    schedule = ChunkSchedule(PAGE_SIZE)
    assert not schedule.serves_longer([])
    schedule.read(planned(counts, 8), counts)
    assert schedule.serves_longer([]) and schedule.serves_longer([2, 8, 16])
    for begun in ([9], [2, 17], [25, 3]):
        assert not schedule.serves_longer(begun)


@pytest.mark.parametrize("change", ["fields moved", "no fields", "no buffer", "other chunks", "part of a page"])
def test_a_schedule_that_cannot_be_read_serves_nothing(change: str, caplog: pytest.LogCaptureFixture) -> None:
    counts = np.array([10, 20, 30])
    wrapper = planned(counts, 8)
    if change == "fields moved":
        wrapper._plan_info = wrapper._plan_info[::-1]
    elif change == "no fields":
        wrapper._plan_info = None
    elif change == "no buffer":
        del wrapper._pin_memory_int_workspace_buffer
    elif change == "other chunks":
        wrapper._pin_memory_int_workspace_buffer.view(torch.int32)[INDPTR_AT // 4 + 1] += 1
    else:
        wrapper._pin_memory_int_workspace_buffer.view(torch.int32)[CHUNK_AT // 4] += 1
    schedule = ChunkSchedule(PAGE_SIZE)
    schedule.read(wrapper, counts)
    schedule.read(wrapper, counts)
    assert not schedule.serves(counts)
    assert caplog.text.count("cannot be read") == 1
