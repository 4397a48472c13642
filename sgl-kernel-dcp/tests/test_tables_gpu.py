"""The table kernel against the oracle, outputs poisoned first."""

from __future__ import annotations

import random

import pytest
import torch
from sgl_kernel_dcp import RowLine, StepMessage, StepTables, TableShape
from sgl_kernel_dcp.tables import FROM_TOKEN_TABLE

from sglang_dcp.dataflow.reference import route_tables
from testing.kernels.random_steps import PATTERNS, random_messages, without_lone_rows

pytestmark = pytest.mark.gpu
POISON = -77
SLOT_BITS = 24


def encode(target: tuple[int, int] | None) -> int:
    return -1 if target is None else target[0] << SLOT_BITS | target[1]


def check_routes(tables: StepTables, message: StepMessage) -> None:
    oracle = route_tables(message.routes, message.tails, tables.rank)
    header = tables.section("header").tolist()
    remote = {shard for sends in oracle.send for shard, _ in sends} - {tables.rank}
    assert header[:4] == [len(oracle.send), len(oracle.attention), len(oracle.kv_receive), sum(1 << shard for shard in remote)]
    count, send, merge = (tables.section(name).tolist() for name in ("target_count", "send_target", "merge_source"))
    kv_target = tables.section("kv_target").tolist()
    for m, (sends, merges) in enumerate(zip(oracle.send, oracle.merge, strict=True)):
        assert count[m] == len(sends)
        assert send[m][: len(sends)] == [encode(target) for target in sends]
        assert merge[m][: len(merges)] == [encode(source) for source in merges]
        assert kv_target[m] == encode(oracle.kv_send[m])
    padding = [None] * (tables.shape.max_attention_rows - len(oracle.attention))
    assert tables.section("return_target").tolist() == [encode(target) for target in [*oracle.give_back, *padding]]
    arriving = len(oracle.kv_receive)
    assert tables.section("kv_source").tolist()[:arriving] == [home for home, _ in oracle.kv_receive]
    slots = [line.kv_slot for line, row in zip(message.rows, oracle.attention, strict=True) if row in set(oracle.kv_receive)]
    assert tables.section("kv_slot").tolist()[:arriving] == slots


def check_pages(tables: StepTables, message: StepMessage, resident: torch.Tensor, token_table: torch.Tensor | None = None) -> None:
    """`resident` is updated to what the kernel must have left."""
    size, rows = tables.shape.page_size, tables.shape.max_attention_rows
    lists = []
    for line in message.rows:
        pages = -(-line.tokens // size)
        if pages and line.new_page >= 0:
            resident[line.entry, pages - 1] = line.new_page
        elif pages and line.new_page <= FROM_TOKEN_TABLE and token_table is not None:
            resident[line.entry, pages - 1] = token_table[FROM_TOKEN_TABLE - line.new_page, (pages - 1) * size] // size
        lists.append(resident[line.entry, :pages].tolist())
    tokens = [line.tokens for line in message.rows] + [0] * (rows - len(lists))
    indptr = [0]
    for row in range(rows):
        indptr.append(indptr[-1] + (len(lists[row]) if row < len(lists) else 0))
    assert tables.section("kv_length").tolist() == tokens
    assert tables.section("page_indptr").tolist() == indptr
    assert tables.section("last_page_length").tolist() == [0 if t == 0 else (t - 1) % size + 1 for t in tokens]
    assert tables.section("page_indices").tolist()[: indptr[-1]] == [page for pages in lists for page in pages]
    block_table = tables.section("block_table").tolist()
    for row, pages in enumerate(lists):
        assert block_table[row][: len(pages)] == pages
    assert torch.equal(tables.resident_pages.cpu(), resident)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "shape",
    [
        TableShape(1, 3, 3, 1, 8, 4, 16),
        TableShape(2, 40, 70, 30, 300, 16, 1),
        TableShape(5, 33, 100, 40, 5000, 64, 64),
        TableShape(16, 64, 1100, 600, 20000, 32, 4),
        TableShape(3, 1024, 1500, 900, 4000, 8, 16),
    ],
)
def test_tables_equal_the_oracle(library, shape: TableShape, pattern: str) -> None:
    num_entries = shape.max_attention_rows + 5
    for seed in range(2):
        messages = random_messages(random.Random(seed), shape, num_entries, num_entries, pattern)
        for rank, message in enumerate(messages[:6]):
            tables = StepTables(shape, rank, num_entries, "cuda:0", shape.max_home_rows * shape.num_instances)
            tables.resident_pages.random_(0, 1 << 20)
            resident = tables.resident_pages.cpu()
            tables.buffer.fill_(POISON)
            tables.upload(message)
            tables.build()
            check_routes(tables, message)
            check_pages(tables, message, resident)
            built = tables.buffer[tables.layout["input_size"] :].clone()
            tables.upload(without_lone_rows(message, rank))
            tables.build()
            assert torch.equal(tables.buffer[tables.layout["input_size"] :], built), "others' own rows are nobody else's business"


def test_pages_that_only_the_device_knows(library) -> None:
    """Lines beyond the token table, and steps without one, leave the page table as it is."""
    shape = TableShape(4, 16, 48, 16, 400, 16, 16)
    token_table = torch.randint(0, 1 << 24, (8, 16 * 16), dtype=torch.int32)
    tables = StepTables(shape, 2, 64, "cuda:0", 64)
    tables.resident_pages.random_(0, 1 << 20)
    resident = tables.resident_pages.cpu()
    rng = random.Random(5)
    for seed in range(10):
        message = random_messages(random.Random(seed), shape, 64, 64, "mixed")[2]
        lines = [line._replace(new_page=FROM_TOKEN_TABLE - rng.randrange(8)) if rng.random() < 0.6 else line for line in message.rows]
        message = message_with(message, lines)
        tables.upload(message)
        tables.build(token_table.cuda(), 1 << 20)
        check_pages(tables, message, resident, token_table)
        tables.build()
        check_pages(tables, message, resident)
    beyond = [line._replace(new_page=FROM_TOKEN_TABLE - 8) for line in message.rows]
    tables.upload(message_with(message, beyond))
    tables.build(token_table.cuda(), 1 << 20)
    assert torch.equal(tables.resident_pages.cpu(), resident)
    elsewhere = [line._replace(new_page=FROM_TOKEN_TABLE) for line in message.rows]
    tables.upload(message_with(message, elsewhere))
    tables.build(token_table.cuda(), 1)
    check_pages(tables, message_with(message, elsewhere), resident, torch.zeros_like(token_table))


def message_with(message: StepMessage, rows: list[RowLine]) -> StepMessage:
    return StepMessage(message.routes, message.tails, rows)


def test_one_graph_follows_the_steps(library) -> None:
    shape = TableShape(4, 16, 48, 16, 400, 16, 16)
    tables = StepTables(shape, 2, 64, "cuda:0", 64)
    tables.resident_pages.random_(0, 1 << 20)
    resident = tables.resident_pages.cpu()
    tables.build()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tables.build()
    for seed in range(20):
        message = random_messages(random.Random(seed), shape, 64, 64, PATTERNS[seed % len(PATTERNS)])[2]
        tables.buffer.fill_(POISON)
        tables.upload(message)
        graph.replay()
        check_routes(tables, message)
        check_pages(tables, message, resident)
