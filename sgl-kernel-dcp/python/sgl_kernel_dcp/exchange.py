"""One instance's end of the per-layer exchange over peer memory.

Call order of a step, on one stream, the same number of exchanges on every instance of the group:
    tables.upload(message); tables.build()
    each layer: dispatch(...); attention over `query_rows`; return_merge(...)
Everything but `upload`, `connect*`, `silent_peers` and `forgive` may be captured in a CUDA graph: the number of the exchange lives on
the device. `phases` splits a call for overlap: send now, receive later on the same stream (nothing of another exchange between).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sgl_kernel_dcp.build import load_library
from sgl_kernel_dcp.shapes import ExchangeShape
from sgl_kernel_dcp.tables import StepTables

if TYPE_CHECKING:
    import torch

PHASE_SEND = 1
PHASE_RECEIVE = 2
WAIT_LIMIT_SECONDS = 2.0
WAIT_LIMIT_SHARED_SECONDS = 60.0


@contextmanager
def launch_together(member: PeerExchange) -> Iterator[None]:
    """Holds the dispatches (or the returns) of up to 8 instances that share one GPU and one process, then launches them as one kernel.

    On one GPU N launches follow each other; on N GPUs they don't. `member`: any of the instances; the launch goes to the current stream.
    """
    library = load_library()
    library.begin_group()
    try:
        yield
    except BaseException:
        library.abandon_group()
        raise
    library.end_group(member.state)


class PeerExchange:
    """Owns the buffer that peers write into. Connect before the first exchange, close after the last; peers must outlive both.

    num_sharing: instances that share this GPU. Their waiting kernels together take at most one block per multiprocessor, and their
    waits last up to 60 s instead of 2 s, because processes on one GPU are time-sliced.
    early_launch: let a kernel of ours be set up while its predecessor ends, and its successor while it ends (programmatic dependent
    launch). Instances that share a GPU do the former only in `launch_together`: by itself a successor could take the place of a peer's
    kernel that it waits for. Off where the attention kernel is launched early and does not wait, as FlashMLA's: it would read queries
    that are still on their way.
    """

    def __init__(
        self,
        rank: int,
        shape: ExchangeShape,
        tables: StepTables,
        *,
        num_sharing: int = 1,
        wait_limit_seconds: float | None = None,
        early_launch: bool = True,
    ) -> None:
        import torch

        self.rank, self.shape, self.tables, self.num_sharing = rank, shape, tables, num_sharing
        self.device = tables.buffer.device
        self._early_launch = early_launch
        default_limit = WAIT_LIMIT_SECONDS if num_sharing == 1 else WAIT_LIMIT_SHARED_SECONDS
        self._wait_limit_ns = int((default_limit if wait_limit_seconds is None else wait_limit_seconds) * 1e9)
        if shape.max_return_rows != tables.max_return_rows:
            raise ValueError(f"max_return_rows is {shape.max_return_rows} here and {tables.max_return_rows} in the tables")
        self._library = load_library()
        self._packed_shape = bytes(shape.record(tables.shape))
        self.layout = {str(k): int(v) for k, v in self._library.exchange_layout(self._packed_shape).items()}
        self._allocation = self._library.allocate_buffer(self.layout["total_bytes"], self.device.index)
        self._bytes = torch.from_dlpack(self._allocation)
        self.state = torch.zeros(self.layout["state_bytes"], dtype=torch.uint8, device=self.device)
        self.state[:16].view(torch.int64).fill_(1)
        self._clear_return_slots()
        self._opened: list[int] = []
        self._handle: int | None = None
        rows, heads = tables.shape.max_attention_rows, shape.num_heads
        begin = self.layout["query_rows"]
        size = rows * heads * shape.qk_head_dim * 2
        self.query_rows = self._bytes[begin : begin + size].view(torch.bfloat16).view(rows, heads, shape.qk_head_dim)
        torch.cuda.synchronize(self.device)

    @property
    def address(self) -> int:
        """Where this process sees the buffer."""
        return self._bytes.data_ptr()

    def ipc_handle(self) -> bytes:
        """What another process on this node needs to open the buffer."""
        return bytes(self._library.ipc_handle(self._bytes))

    def connect(self, addresses: list[int]) -> None:
        """Peers in this process: every instance's `address`, by rank."""
        if self._handle is not None:
            raise RuntimeError("this exchange is connected already")
        self._handle = self._library.create_exchange(
            self._packed_shape,
            bytes(self.tables.shape.record()),
            addresses,
            self.rank,
            self.device.index,
            self.num_sharing,
            self._wait_limit_ns,
            self._early_launch,
        )

    def connect_processes(self, handles: list[bytes]) -> None:
        """Peers in other processes of this node: every instance's `ipc_handle()`, by rank."""
        self._opened = [0 if peer == self.rank else self._library.open_ipc_handle(h, self.device.index) for peer, h in enumerate(handles)]
        self.connect([address or self.address for address in self._opened])

    def dispatch(
        self,
        query: torch.Tensor,
        *,
        query_rope: torch.Tensor | None = None,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        key_pool: torch.Tensor | None = None,
        value_pool: torch.Tensor | None = None,
        phases: int = PHASE_SEND | PHASE_RECEIVE,
    ) -> torch.Tensor:
        """Sends home rows to their shards and waits for the rows to attend; returns `query_rows` [max_attention_rows, heads, qk_head_dim].

        query [home rows, heads, dim] (MLA: the latent part, with query_rope the rest of each head). key [home rows, 1, elements] and
        value: the new tokens' K/V, sent where the tail is remote; key_pool/value_pool [slots, elements]: where arriving ones are
        written. MLA: key the latent, value the rotary part, both pools views of one. Rows may be strided, 16-byte aligned.
        """
        self._library.dispatch(
            self._connected(), self.tables.buffer, self.state, query, query_rope, key, value, key_pool, value_pool, phases
        )
        return self.query_rows

    def return_merge(
        self,
        partial: torch.Tensor,
        partial_lse: torch.Tensor,
        merged: torch.Tensor,
        merged_lse: torch.Tensor | None = None,
        *,
        phases: int = PHASE_SEND | PHASE_RECEIVE,
    ) -> None:
        """Sends partial results home and merges what arrives for this instance's rows into `merged` [home rows, heads, v_head_dim].

        partial [attention rows, heads, v_head_dim] bfloat16 and partial_lse [attention rows, heads] float32 in natural log, in the
        order of `query_rows`, which peers may overwrite from here on. A row without shards becomes neutral; a silent peer's partial
        counts as neutral.
        """
        self._library.return_merge(
            self._connected(), self.tables.buffer, self.state, partial, partial_lse, merged, merged_lse, phases
        )

    def silent_peers(self) -> dict[int, int]:
        """Peers that missed a wait, with the number of that exchange. Synchronises the device; call it between steps."""
        import torch

        state = self.state.cpu()
        offset = self.layout["silent_mask"]
        mask = int(state[offset : offset + 4].view(torch.int32)[0])
        epochs = state[self.layout["silent_epoch"] :].view(torch.int64)
        return {peer: int(epochs[peer]) for peer in range(self.tables.shape.num_instances) if mask >> peer & 1}

    def forgive(self) -> None:
        """Clears the mask of silent peers, and what they may have left, when the group has agreed that all are at the same exchange."""
        offset = self.layout["silent_mask"]
        self.state[offset : offset + 4].zero_()
        self._clear_return_slots()

    def _clear_return_slots(self) -> None:
        """A slot of ones holds nothing: see ExchangeLayout in layout.cuh."""
        size = self.shape.max_return_rows * self.shape.num_heads * self.shape.v_head_dim * 2
        begin = self.layout["return_slots"]
        self._bytes[begin : begin + size].fill_(0xFF)

    def close(self) -> None:
        """Closes what was opened. The buffer goes with the last reference to it."""
        if self._handle is not None:
            self._library.destroy_exchange(self._handle)
            self._handle = None
        for address in self._opened:
            if address:
                self._library.close_ipc_handle(address)
        self._opened = []

    def _connected(self) -> int:
        if self._handle is None:
            raise RuntimeError("connect this exchange to its peers before use")
        return self._handle
