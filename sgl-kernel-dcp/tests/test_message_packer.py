"""Messages packed one after another are those packed alone, whoever tells the same again."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sgl_kernel_dcp import StepArrays, TableShape
from sgl_kernel_dcp.message_checks import ROUTE_TAIL_SHIFT
from sgl_kernel_dcp.message_packer import MessagePacker
from sgl_kernel_dcp.tables import pack_message

SHAPE, RANK, NUM_ENTRIES, MAX_RETURNS = TableShape(4, 6, 24, 24, 96, 4, 4), 1, 32, 18
LAYOUT = {"input_routes": 32, "input_rows": 32 + SHAPE.num_instances * SHAPE.max_home_rows}


def random_words(rng: random.Random, home: int) -> np.ndarray:
    words = []
    for _ in range(rng.randint(0, SHAPE.max_home_rows)):
        mask = rng.randrange(1, 1 << SHAPE.num_instances)
        remote = [shard for shard in range(SHAPE.num_instances) if mask >> shard & 1 and shard != home]
        tail = rng.choice([-1, *remote])
        words.append(mask | tail + 1 << ROUTE_TAIL_SHIFT)
    return np.array(words, dtype=np.int32)


def rows_of(rng: random.Random, words: list[np.ndarray]) -> np.ndarray:
    in_order = np.concatenate([*words[:RANK], *words[RANK + 1 :], words[RANK]])
    here = in_order[in_order >> RANK & 1 == 1]
    rows = [[rng.randrange(NUM_ENTRIES), rng.randint(0, 16), rng.choice([-1, 7, -9]), -1] for _ in here]
    for row, word in zip(rows, here.tolist(), strict=True):
        row[3] = 5 if word >> ROUTE_TAIL_SHIFT == RANK + 1 else -1
        if row[1] == 0:
            row[0] = rng.choice([row[0], -1])  # an empty shard's entry is nobody's business
    return np.array(rows, dtype=np.int32).reshape(-1, 4)


def packed_plainly(words: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """The message's words, laid out at once and without a check."""
    packed = np.zeros(LAYOUT["input_rows"] + 4 * len(rows), dtype=np.int32)
    packed[: SHAPE.num_instances] = [len(word) for word in words]
    packed[16] = len(rows)
    routes = packed[LAYOUT["input_routes"] : LAYOUT["input_rows"]].reshape(SHAPE.num_instances, SHAPE.max_home_rows)
    for home, word in enumerate(words):
        routes[home, : len(word)] = word
    packed[LAYOUT["input_rows"] :] = rows.reshape(-1)
    return packed


@pytest.mark.parametrize("seed", range(5))
def test_messages_packed_one_after_another(seed: int) -> None:
    """Homes tell more rows or fewer, or hand in the same array; what is refused in between leaves nothing behind."""
    rng = random.Random(seed)
    packer = MessagePacker(SHAPE, RANK, NUM_ENTRIES, MAX_RETURNS, LAYOUT)
    words, num_refused = [random_words(rng, home) for home in range(SHAPE.num_instances)], 0
    for _ in range(300):
        words = [random_words(rng, home) if rng.random() < 0.3 else word for home, word in enumerate(words)]
        rows = rows_of(rng, words)
        if rng.random() < 0.3:
            home = rng.randrange(SHAPE.num_instances)
            wrong = [np.full(3, 1 << 9, dtype=np.int32) if other == home else word for other, word in enumerate(words)]
            for refused in (StepArrays(wrong, rows), StepArrays(words, np.full((len(rows) + 1, 4), 3, dtype=np.int32))):
                with pytest.raises(ValueError, match="beyond 3|message lists"):
                    packer.pack(refused)
                num_refused += 1
        alone = pack_message(StepArrays(words, rows), SHAPE, RANK, NUM_ENTRIES, MAX_RETURNS, LAYOUT)
        assert packer.pack(StepArrays(words, rows)).tolist() == alone.tolist() == packed_plainly(words, rows).tolist()
        assert packer.expects == (rows[:, 3] >= 0).tobytes()
    assert num_refused > 50


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({(0, 3): 9}, "kv_slot 9, but K/V does not arrive"),
        ({(0, 1): 17}, "max_pages_per_row.* is 5"),
        ({(1, 0): 32}, "row 1: entry 32 with 3 tokens"),
        ({(1, 1): -1}, "row 1: entry 2 with -1 tokens"),
    ],
)
def test_a_row_beyond_a_capacity_is_refused_whatever_was_packed_before(change: dict[tuple[int, int], int], text: str) -> None:
    packer = MessagePacker(SHAPE, RANK, NUM_ENTRIES, MAX_RETURNS, LAYOUT)
    words = [np.array(of_home, dtype=np.int32) for of_home in ([3], [2], [], [])]
    rows = np.array([[1, 16, -1, -1], [2, 3, -1, -1]], dtype=np.int32)
    packer.pack(StepArrays(words, rows))
    for (row, column), value in change.items():
        rows[row, column] = value
    for pack in (packer.pack, lambda arrays: pack_message(arrays, SHAPE, RANK, NUM_ENTRIES, MAX_RETURNS, LAYOUT)):
        with pytest.raises(ValueError, match=text):
            pack(StepArrays(words, rows))
