"""What is compared: one server each, on the same GPUs with the same pools, one at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

FA3 = ("--attention-backend", "fa3")
FAKE_PREFILL = {"bootstrap_host": "2.2.2.2"}
"""SGLang's name for a prefill server that is not there: K/V are what the pool holds."""


@dataclass(frozen=True)
class Contender:
    """name: in results and on the command line. flags: beside what all have. fields: of every request."""

    name: str
    what: str
    dyncp: bool
    flags: tuple[str, ...] = ()
    fields: dict[str, str] = field(default_factory=dict)


def contenders(num_gpus: int) -> dict[str, Contender]:
    """By name, for one instance per GPU."""
    whole = ("--dyncp-max-degree", "1")
    n = str(num_gpus)
    # SGLang's own way to decode without prefills, for all of them.
    decode_only = ("--disaggregation-mode", "decode", "--disaggregation-transfer-backend", "fake")
    # Its own default kernels on Hopper.
    stock_only = (*decode_only, *FA3, "--disaggregation-decode-retraction-backup", "cpu_tensor")
    data_parallel = ("--attn-dp-size", n, "--ep-size", n, "--load-balance-method", "total_tokens")
    ours = [
        Contender("local", "SGLang's balancing, our runtime", True, ("--dyncp-policy", "local")),
        Contender("whole", "every request whole, placed by our policy", True, whole),
        Contender("whole-stock-split", "the same, FlashInfer's own split", True, (*whole, "--dyncp-split-budget", "stock")),
        Contender("length-buckets", "degree by prompt length, as NanoCP's release", True, ("--dyncp-policy", "length-buckets")),
        Contender("ours", "dual-balance, FlashInfer's kernels in every step", True),
        Contender("ours-fa3", "dual-balance as users start it: SGLang's default kernel where nobody is sharded", True, FA3),
    ]
    static = ("--dcp-size", n, "--ep-size", n)
    found = [
        Contender("stock", "SGLang's data parallelism with its defaults", False, (*data_parallel, *stock_only), FAKE_PREFILL),
        Contender("static-dcp", "SGLang's static context parallelism", False, (*static, *stock_only), FAKE_PREFILL),
        *(Contender(c.name, c.what, True, (*c.flags, *decode_only), FAKE_PREFILL) for c in ours),
    ]
    return {contender.name: contender for contender in found}
