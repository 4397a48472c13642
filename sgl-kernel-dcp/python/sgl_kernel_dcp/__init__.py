"""CUDA kernels of sglang_dcp: the step's tables, dispatch, return and merge. Importing compiles and loads nothing."""

from sgl_kernel_dcp.exchange import PHASE_RECEIVE, PHASE_SEND, PeerExchange, launch_together
from sgl_kernel_dcp.merge import merge_stacked
from sgl_kernel_dcp.shapes import ExchangeShape, TableShape
from sgl_kernel_dcp.tables import RowLine, StepArrays, StepMessage, StepTables
from sgl_kernel_dcp.token_ids import FROM_POOL, decode_token_ids

__all__ = [
    "FROM_POOL",
    "PHASE_RECEIVE",
    "PHASE_SEND",
    "ExchangeShape",
    "PeerExchange",
    "RowLine",
    "StepArrays",
    "StepMessage",
    "StepTables",
    "TableShape",
    "decode_token_ids",
    "launch_together",
    "merge_stacked",
]
