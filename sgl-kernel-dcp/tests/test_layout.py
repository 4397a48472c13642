"""Compile check for sm_90, byte maps, and the checks before a launch. No GPU needed."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import itertools
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from sgl_kernel_dcp import ExchangeShape, RowLine, StepMessage, TableShape
from sgl_kernel_dcp.build import build_library, source_files
from sgl_kernel_dcp.shapes import MAX_INSTANCES, ExchangeShapeRecord, TableShapeRecord
from sgl_kernel_dcp.tables import FROM_TOKEN_TABLE, ROUTE_TAIL_SHIFT, pack_message

from testing.kernels.random_steps import random_messages

SHAPES = [
    (TableShape(2, 1, 1, 1, 1, 1, 1), ExchangeShape(1, 8, 8, 8, 1)),
    (TableShape(4, 8, 24, 8, 100, 16, 64), ExchangeShape(128, 576, 512, 576, 24)),
    (TableShape(16, 256, 512, 256, 4096, 64, 16), ExchangeShape(64, 128, 128, 1024, 512)),
    (TableShape(3, 7, 11, 5, 13, 3, 1), ExchangeShape(20, 192, 128, 576, 9)),
]
QUERY_PIECE_BYTES, RETURN_PIECE_BYTES, MERGE_PIECE_BYTES = 1024, 2048, 512  # what one warp moves


def test_headers_are_framework_free() -> None:
    for path in source_files():
        if path.suffix == ".cuh":
            text = path.read_text()
            assert "torch" not in text and "tvm" not in text, path


def test_constants_that_the_runtime_repeats() -> None:
    from sglang_dcp.dataflow.graph.route_words import TAIL_SHIFT
    from sglang_dcp.dataflow.graph.static_tables import FROM_TOKEN_TABLE as FROM_TABLE
    from sglang_dcp.upstream.layers.peers import MOST_PEERS

    assert (ROUTE_TAIL_SHIFT, FROM_TOKEN_TABLE) == (TAIL_SHIFT, FROM_TABLE)
    assert MAX_INSTANCES == MOST_PEERS


def find_cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(carried) if carried.is_file() else None
    return found


def test_library_holds_sm_90_code_for_every_kernel(library) -> None:
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump on this machine")
    listing = subprocess.run([cuobjdump, "--dump-resource-usage", str(build_library())], capture_output=True, text=True, check=True).stdout
    assert "sm_90" in listing
    for kernel in ("step_tables_kernel", "dispatch_kernel", "return_merge_kernel", "stacked_merge_kernel"):
        assert kernel in listing


@pytest.mark.parametrize(("tables", "exchange"), SHAPES)
def test_sections_do_not_overlap_and_hold_their_contents(library, tables: TableShape, exchange: ExchangeShape) -> None:
    record = exchange.record(tables)
    layout = {str(k): int(v) for k, v in library.exchange_layout(bytes(record)).items()}
    pieces, heads, output_bytes = layout["num_query_pieces"], exchange.num_heads, exchange.num_heads * exchange.v_head_dim * 2
    assert pieces * QUERY_PIECE_BYTES >= record.query_row_bytes > (pieces - 1) * QUERY_PIECE_BYTES
    for name, size in (("num_return_pieces", RETURN_PIECE_BYTES), ("num_merge_pieces", MERGE_PIECE_BYTES)):
        assert layout[name] * size >= output_bytes > (layout[name] - 1) * size
    needs = {
        "acknowledgement": 8 * tables.num_instances,
        "query_flag": 8 * tables.max_attention_rows * pieces,
        "kv_flag": 8 * tables.max_kv_rows,
        "return_lse": 8 * exchange.max_return_rows * heads,
        "query_rows": tables.max_attention_rows * record.query_row_bytes,
        "kv_rows": tables.max_kv_rows * record.kv_row_bytes,
        "return_slots": exchange.max_return_rows * output_bytes,
    }
    end = 0
    for name, size in needs.items():
        assert layout[name] % 256 == 0 and layout[name] >= end, name
        end = layout[name] + size
    assert end <= layout["total_bytes"] < end + 256


@pytest.mark.parametrize(("tables", "exchange"), SHAPES)
def test_table_sections_do_not_overlap(library, tables: TableShape, exchange: ExchangeShape) -> None:
    layout = {str(k): int(v) for k, v in library.table_layout(bytes(tables.record())).items()}
    home, attention = tables.max_home_rows, tables.max_attention_rows
    needs = {
        "input_counts": 17,
        "input_routes": tables.num_instances * home,
        "input_rows": attention * 4,
        "header": 16,
        "target_count": home,
        "send_target": home * 16,
        "merge_source": home * 16,
        "kv_target": home,
        "return_target": attention,
        "kv_source": tables.max_kv_rows,
        "kv_slot": tables.max_kv_rows,
        "kv_length": attention,
        "page_indptr": attention + 1,
        "last_page_length": attention,
        "page_indices": tables.max_pages,
        "block_table": attention * tables.max_pages_per_row,
    }
    end = 0
    for name, size in needs.items():
        assert layout[name] % 4 == 0 and layout[name] >= end, name
        end = layout[name] + size
    assert layout["input_size"] <= layout["header"] and end <= layout["total_size"]


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("num_instances", 17, "num_instances is 17"),
        ("max_home_rows", 1025, "max_home_rows is 1025"),
        ("query_row_bytes", 24, "query_row_bytes"),
        ("v_head_bytes", 8200, "v_head_bytes"),
        ("max_return_rows", 1 << 20, "vectors of all partial results.* is 8589934592"),
        ("kv_row_bytes", 8, "kv_row"),
    ],
)
def test_capacity_beyond_a_limit_is_refused_by_name(library, field: str, value: int, text: str) -> None:
    record = SHAPES[1][1].record(SHAPES[1][0])
    setattr(record, field, value)
    with pytest.raises(ValueError, match=text):
        library.exchange_layout(bytes(record))


@pytest.mark.parametrize(("name", "record"), [("table_shape_record", TableShapeRecord), ("exchange_shape_record", ExchangeShapeRecord)])
def test_a_record_has_the_same_fields_on_both_sides(library, name: str, record: type[ctypes.Structure]) -> None:
    """Names, offsets and size; every field is as wide as the way to the next."""
    theirs = {str(field): int(offset) for field, offset in getattr(library, name)().items()}
    print(f"{record.__name__}: {theirs}")
    ours = {field: getattr(record, field).offset for field, _ in record._fields_}
    assert theirs == {**ours, "size": ctypes.sizeof(record)}
    ends = [*sorted(ours.values()), ctypes.sizeof(record)]
    assert [end - begin for begin, end in itertools.pairwise(ends)] == [4] * len(ours)


def test_each_field_of_a_record_holds_what_it_is_named_for() -> None:
    """Distinct values, so that no two of them could change places unseen."""
    tables, exchange = TableShape(2, 3, 11, 5, 7, 9, 13), ExchangeShape(17, 40, 24, 56, 19)
    assert dataclasses.asdict(tables) == {field: getattr(tables.record(), field) for field, _ in TableShapeRecord._fields_}
    record = exchange.record(tables)
    assert {field: getattr(record, field) for field, _ in ExchangeShapeRecord._fields_} == {
        "num_instances": 2,
        "max_home_rows": 3,
        "max_attention_rows": 11,
        "max_kv_rows": 5,
        "max_return_rows": 19,
        "num_heads": 17,
        "query_row_bytes": 17 * 40 * 2,
        "v_head_bytes": 24 * 2,
        "kv_row_bytes": 56 * 2,
    }


def test_a_record_refuses_what_it_would_cut_off(library) -> None:
    with pytest.raises(ValueError, match="max_pages is 4294967296, beyond the 32 bits"):
        TableShape(2, 1, 1, 1, 1 << 32, 1, 1).record()
    with pytest.raises(ValueError, match="a table shape has 24 bytes, must have 28"):
        library.table_layout(bytes(SHAPES[0][0].record())[:-4])


def layout_of(library, shape: TableShape) -> dict[str, int]:
    return {str(k): int(v) for k, v in library.table_layout(bytes(shape.record())).items()}


def test_messages_within_the_capacities_pass(library) -> None:
    shape = TableShape(4, 6, 20, 9, 64, 8, 4)
    for seed in range(50):
        rng = random.Random(seed)
        for rank, message in enumerate(random_messages(rng, shape, 32, 64, "mixed")):
            packed = pack_message(message, shape, rank, 32, 24, layout_of(library, shape))
            assert packed[16] == len(message.rows)


BASE = StepMessage([[[0, 1]], [[1]]], [[1], [-1]], [RowLine(0, 5, -1, 3), RowLine(1, 9)])


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (StepMessage([[[0, 1]]], [[1]], []), "1 homes, the group has 2"),
        (StepMessage([[[0, 1]] * 5, []], [[-1] * 5, []], [RowLine(0, 1)] * 5), "max_home_rows.* is 5, the limit of these buffers is 4"),
        (StepMessage([[[0, 2]], []], [[-1], []], []), "beyond 1"),
        (StepMessage([[[0, 1]], []], [[0], []], [RowLine(0, 1)]), "must be a remote shard"),
        (StepMessage([[[0, 1]], []], [[-1], []], []), "1 attention rows, the message lists 0"),
        (StepMessage([[[1]] * 4, [[1]] * 3], [[-1] * 4, [-1] * 3], [RowLine(0, 1)] * 7), "max_attention_rows.* is 7"),
        (StepMessage(BASE.routes, BASE.tails, [RowLine(0, 5), RowLine(1, 9)]), "kv_slot -1, but K/V arrives"),
        (StepMessage(BASE.routes, BASE.tails, [RowLine(0, 5, -1, 3), RowLine(1, 9, -1, 4)]), "does not arrive"),
        (StepMessage(BASE.routes, BASE.tails, [RowLine(0, 5, -1, 3), RowLine(8, 9)]), "entry 8"),
        (StepMessage(BASE.routes, BASE.tails, [RowLine(0, 5, -1, 3), RowLine(1, 40)]), "max_pages"),
        (StepMessage([[], [[0, 1]] * 3], [[], [-1] * 3], [RowLine(0, 1)] * 3), "max_return_rows.* is 3"),
    ],
)
def test_message_beyond_a_capacity_is_refused_by_name(library, message: StepMessage, text: str) -> None:
    shape = TableShape(2, 4, 6, 2, 8, 4, 4)
    with pytest.raises(ValueError, match=text):
        pack_message(message, shape, 1, 8, 2, layout_of(library, shape))
    assert len(pack_message(BASE, shape, 1, 8, 2, layout_of(library, shape))) > 0
