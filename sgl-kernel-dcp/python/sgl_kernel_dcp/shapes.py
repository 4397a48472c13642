"""Capacities fixed at start. Byte maps are derived from them in include/sgl_kernel_dcp/layout.cuh and nowhere else.

The records at the end of this file are the structs of the same names there, field by field; test_layout.py holds the two together.
"""

from __future__ import annotations

import ctypes
import dataclasses
from dataclasses import dataclass
from typing import TypeVar

MAX_INSTANCES = 16
MAX_HOME_ROWS = 1024
ELEMENT_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class TableShape:
    """Sizes of the step's tables. All instances of a group use the same values."""

    num_instances: int
    max_home_rows: int  # M: rows of one instance's batch
    max_attention_rows: int  # S: rows one instance attends, own ones included
    max_kv_rows: int  # arriving K/V rows
    max_pages: int  # page indices of all attention rows together
    max_pages_per_row: int
    page_size: int

    def record(self) -> TableShapeRecord:
        return _fill(TableShapeRecord, **dataclasses.asdict(self))


@dataclass(frozen=True)
class ExchangeShape:
    """Sizes of one layer's messages, bfloat16. kv_row_elements: K and V of one new token (MLA: latent and rotary part)."""

    num_heads: int
    qk_head_dim: int
    v_head_dim: int
    kv_row_elements: int
    max_return_rows: int  # partial results that may come from peers in one exchange

    def record(self, tables: TableShape) -> ExchangeShapeRecord:
        return _fill(
            ExchangeShapeRecord,
            num_instances=tables.num_instances,
            max_home_rows=tables.max_home_rows,
            max_attention_rows=tables.max_attention_rows,
            max_kv_rows=tables.max_kv_rows,
            max_return_rows=self.max_return_rows,
            num_heads=self.num_heads,
            query_row_bytes=self.num_heads * self.qk_head_dim * ELEMENT_BYTES,
            v_head_bytes=self.v_head_dim * ELEMENT_BYTES,
            kv_row_bytes=self.kv_row_elements * ELEMENT_BYTES,
        )


class TableShapeRecord(ctypes.Structure):
    """`TableShape` of layout.cuh. `bytes` of it is what the library takes."""

    _fields_ = [(field.name, ctypes.c_int32) for field in dataclasses.fields(TableShape)]


class ExchangeShapeRecord(ctypes.Structure):
    """`ExchangeShape` of layout.cuh, in bytes where ours counts elements. `bytes` of it is what the library takes."""

    _fields_ = [
        ("num_instances", ctypes.c_int32),
        ("max_home_rows", ctypes.c_int32),
        ("max_attention_rows", ctypes.c_int32),
        ("max_kv_rows", ctypes.c_int32),
        ("max_return_rows", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("query_row_bytes", ctypes.c_int32),
        ("v_head_bytes", ctypes.c_int32),
        ("kv_row_bytes", ctypes.c_int32),
    ]


Record = TypeVar("Record", TableShapeRecord, ExchangeShapeRecord)


def _fill(record: type[Record], **values: int) -> Record:
    """ctypes would cut a value that its field does not hold. ValueError names it."""
    for name, value in values.items():
        if ctypes.c_int32(value).value != value:
            raise ValueError(f"{name} is {value}, beyond the 32 bits of its field")
    return record(**values)
