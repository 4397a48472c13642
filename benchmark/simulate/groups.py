"""Which comparisons are simulated: deployments, workloads, policies, seeds and limits of every group, as data."""

from __future__ import annotations

from typing import Any

from benchmark.simulate.variants import Deployment

SEEDS = (1, 2, 3, 4, 5)
LIMITS = (("p99", 60.0), ("p99", 75.0), ("p99", 100.0))
ALL_LIMITS = (("p99", 50.0), ("mean", 50.0), *LIMITS, ("mean", 100.0))
FULL_POOL_LIMITS = (("p99", 75.0), ("p99", 100.0))
SENSITIVITY_LIMITS = (("p99", 60.0), ("p99", 75.0))
LOW_LIMITS = (("p99", 55.0), ("p99", 50.0))
WAITING = (("latency", 60.0), ("latency", 75.0), ("latency", 100.0))
MAIN = ("dual-balance", "length-buckets", "local-least-batch", "local-least-kv", "oracle")
# A run sends for this many seconds, longer at low rates so that the P99 rests on enough requests.
SECONDS, MIN_REQUESTS, MAX_SECONDS = 180.0, 4000, 800.0

DP_AND_OURS = ("dual-balance", "length-buckets", "local-least-batch", "local-least-kv")
KIMI, TIGHT = Deployment("kimi-k2"), Deployment(pool_tokens=1_000_000)
NODES: dict[str, Any] = {
    "workloads": ("chat-1pct",),
    "policies": ("dual-balance", "local-least-batch", "local-least-kv"),
    "seeds": (1, 2, 3),
    "limits": (("p99", 75.0),),
    "seconds": 120.0,
    "file": "nodes",
}
# A group may name: deployment, limits, seconds (length of every run), overrides (settings), file (where its cases are stored).
GROUPS: dict[str, dict[str, Any]] = {
    "bars": {"workloads": ("chat-1pct", "weka", "mooncake", "chat-5pct"), "policies": MAIN, "seeds": SEEDS},
    "kimi": {"deployment": KIMI, "workloads": ("chat-1pct",), "policies": MAIN, "seeds": SEEDS},
    "tight-pool": {"deployment": TIGHT, "workloads": ("chat-1pct",), "policies": MAIN, "seeds": SEEDS},
    # The authors send for 600 s: a P99 over three times as many requests hangs less on which long prompts a seed draws.
    "long-run": {"workloads": ("chat-1pct",), "policies": MAIN, "seeds": SEEDS, "seconds": 600.0},
    # Perfect balance at every moment, but the fixed part of the exchange is paid: what a policy that splits could reach at best.
    "oracle-exchange": {"workloads": ("chat-1pct", "chat-5pct", "weka", "mooncake"), "policies": ("oracle-exchange",), "seeds": SEEDS},
    # How far the tail of the long prompts carries the gain over data parallelism, and whether full pools then matter.
    "tail": {"workloads": ("chat-1pct-heavy", "chat-1pct-heaviest"), "policies": MAIN, "seeds": SEEDS},
    "tail-kimi": {
        "deployment": KIMI,
        "workloads": ("chat-1pct-heaviest",),
        "policies": MAIN,
        "seeds": SEEDS,
        "limits": FULL_POOL_LIMITS,
    },
    "tail-tight": {
        "deployment": TIGHT,
        "workloads": ("chat-1pct-heaviest",),
        "policies": MAIN,
        "seeds": SEEDS,
        "limits": FULL_POOL_LIMITS,
    },
    # Who waits for whom when a pool is full: the whole queue in order, or nobody for anybody.
    "order-global": {
        "deployment": TIGHT,
        "workloads": ("chat-1pct-heaviest",),
        "policies": ("dual-balance", "local-least-batch", "local-least-kv"),
        "seeds": SEEDS,
        "limits": FULL_POOL_LIMITS,
        "overrides": {"admission": "global"},
    },
    "order-any": {
        "deployment": TIGHT,
        "workloads": ("chat-1pct-heaviest",),
        "policies": ("dual-balance", "local-least-batch", "local-least-kv"),
        "seeds": SEEDS,
        "limits": FULL_POOL_LIMITS,
        "overrides": {"admission": "any"},
    },
    # Waiting counted as part of a request's latency, on the cases of other groups.
    "waiting": {"workloads": ("chat-1pct", "chat-5pct"), "policies": DP_AND_OURS, "seeds": SEEDS, "limits": WAITING, "file": "bars"},
    "waiting-kimi": {
        "deployment": KIMI,
        "workloads": ("chat-1pct",),
        "policies": DP_AND_OURS,
        "seeds": SEEDS,
        "limits": WAITING,
        "file": "kimi",
    },
    # Where the gain of 4x begins: below 60 ms little but the constant part of a step is left for data parallelism.
    "low-limits": {
        "workloads": ("chat-1pct",),
        "policies": ("dual-balance", "local-least-batch", "oracle", "length-buckets", "local-least-kv"),
        "seeds": SEEDS,
        "limits": LOW_LIMITS,
        "file": "bars",
    },
    "ablation": {
        "workloads": ("chat-1pct", "weka"),
        "policies": ("dual-frozen", "dual-batch-blind", "dual-kv-blind", "dual-degree-1", "dual-exchange-twice", "buckets-exchange-twice"),
        "seeds": SEEDS,
        "limits": SENSITIVITY_LIMITS,
    },
    "moves": {
        "workloads": ("chat-1pct", "chat-5pct", "weka"),
        "policies": ("dual-moves",),
        "seeds": SEEDS,
        "limits": SENSITIVITY_LIMITS,
    },
    "slo": {
        "workloads": ("chat-1pct", "chat-5pct", "mooncake", "weka"),
        "policies": MAIN,
        "seeds": SEEDS,
        "limits": ALL_LIMITS,
        "file": "bars",
    },
    "baselines": {"workloads": ("chat-1pct",), "policies": ("local-round-robin", "fixed-2", "fixed-4", "fixed-8"), "seeds": SEEDS},
    "short": {"workloads": ("chat-0pct", "servegen-r1"), "policies": MAIN, "seeds": SEEDS, "file": "bars"},
    "prefill-same": {
        "workloads": ("chat-1pct",),
        "policies": ("dual-prefill-same", "local-least-batch-prefill-same", "local-least-kv-prefill-same"),
        "seeds": SEEDS,
        "limits": (("p99", 300.0),),
    },
    "qwen": {"deployment": Deployment("qwen3-235b-a22b"), "workloads": ("chat-1pct",), "policies": MAIN, "seeds": SEEDS},
    "azure": {"workloads": ("azure-clock",), "policies": MAIN, "seeds": SEEDS},
    # As many instances as public recipes go to, in nodes of two sizes: shards of a request stay in one.
    "nodes": {**NODES, "deployment": Deployment(num_instances=72, node_size=8)},
    "nodes-of-12": {**NODES, "deployment": Deployment(num_instances=72, node_size=12)},
    "h100": {"deployment": Deployment(gpu="h100"), "workloads": ("chat-1pct",), "policies": MAIN, "seeds": SEEDS},
}
FIRST_GUESS = {
    "chat-0pct": 80.0,
    "chat-1pct": 60.0,
    "chat-1pct-heavy": 40.0,
    "chat-1pct-heaviest": 40.0,
    "chat-5pct": 35.0,
    "weka": 7.0,
    "mooncake": 60.0,
    "servegen-r1": 35.0,
    "azure-clock": 60.0,
}
# Every constant at +-30 %, at the 60 and 75 ms limits. Constant terms of a layer add up, so `layer_other_us`, the largest, stands for
# all of them; the constants between nodes and of prefill take part in none of these runs.
SCALED_CONSTANTS = (
    "layer_other_us",
    "attention_us_per_token",
    "exchange_fixed_us",
    "pool_tokens",
    "combine_us_per_request",
    "dispatch_us_per_request",
    "exchange_us_per_row",
    "step_fixed_us",
    "expert_weight_us",
)
SENSITIVITY_SECONDS = 100.0
