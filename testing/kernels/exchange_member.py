"""One instance of an exchange among processes. A module of its own, so that a spawned process can import it by name."""

from __future__ import annotations

import random
from typing import Any

import torch
from sgl_kernel_dcp import ExchangeShape, PeerExchange, StepTables, TableShape

from sglang_dcp.dataflow.merge import merge_partial_states
from sglang_dcp.dataflow.reference import route_tables
from testing.kernels.random_steps import PATTERNS, random_messages

NUM_ROUNDS = 12


def member(rank: int, num_instances: int, num_gpus: int, pipe: Any) -> None:
    """One instance: hands out its IPC handle, gets everybody's, runs the rounds, sends its worst violation counts back."""
    device = f"cuda:{rank % num_gpus}"
    torch.cuda.set_device(device)
    table_shape, shape = TableShape(num_instances, 6, 14, 6, 256, 16, 16), ExchangeShape(32, 128, 128, 512, 18)
    tables = StepTables(table_shape, rank, 32, device, 18)
    exchange = PeerExchange(rank, shape, tables, num_sharing=num_instances // num_gpus)
    pipe.send(exchange.ipc_handle())
    exchange.connect_processes(pipe.recv())
    worst = 0.0
    for seed in range(NUM_ROUNDS):
        message = random_messages(random.Random(seed), table_shape, 32, 32, PATTERNS[seed % len(PATTERNS)])[rank]
        torch.manual_seed(seed)  # every process draws the same numbers
        query = torch.randn(num_instances, 6, 32, 128).to(torch.bfloat16).cuda()
        kv = torch.randn(num_instances, 6, 1, 512).to(torch.bfloat16).cuda()
        lse = torch.randn(num_instances, 14, 32).cuda()
        shift = torch.randn(num_instances).tolist()
        pool = torch.full((32, 512), -7.0, dtype=torch.bfloat16, device=device)
        merged = torch.full((6, 32, 128), float("nan"), dtype=torch.bfloat16, device=device)
        tables.upload(message)
        tables.build()
        rows = exchange.dispatch(query[rank], key=kv[rank], key_pool=pool)
        received = rows.clone()  # peers may overwrite the rows once the return has begun
        partial = rows + shift[rank]
        exchange.return_merge(partial, lse[rank], merged)
        torch.cuda.synchronize()
        oracle = route_tables(message.routes, message.tails, rank)
        for slot, (h, m) in enumerate(oracle.attention):
            worst = max(worst, float((received[slot] != query[h, m]).sum()))
            if message.rows[slot].kv_slot >= 0:
                worst = max(worst, float((pool[message.rows[slot].kv_slot] != kv[h, m, 0]).sum()))
        for m, sends in enumerate(oracle.send):
            if sends:
                parts = torch.stack([query[rank, m].float() + shift[s] for s, _ in sends])
                expected = merge_partial_states(parts, torch.stack([lse[s, slot] for s, slot in sends])).output
                worst = max(worst, float(((merged[m].float() - expected).abs() > 0.05).sum()))
    silent = exchange.silent_peers()
    pipe.send((worst, silent))
    pipe.recv()  # peers may still write here
    exchange.close()
