"""What SGLang's CUDA path gets wrong, found while its answers were compared with ours."""

from __future__ import annotations

from ..codemod import Contribution, EditedTree

DECODE_PLAN = "sglang.srt.layers.attention.flashinfer_backend.FlashInferIndicesUpdaterDecode.call_begin_forward"


def plan_guard(tree: EditedTree) -> None:
    wait = """
    # plan() writes a pinned buffer of the wrapper and starts a copy from it.
    # The copy of the last plan may still be queued behind other work of the GPU.
    last_plan_copied = getattr(wrapper, "_last_plan_copied", None)
    if last_plan_copied is not None:
        last_plan_copied.synchronize()
    """
    mark = """
    if kv_indptr.is_cuda:
        if last_plan_copied is None:
            last_plan_copied = wrapper._last_plan_copied = torch.cuda.Event()
        last_plan_copied.record()
    """
    tree.insert_first(DECODE_PLAN, wait)
    tree.insert_last(DECODE_PLAN, mark)


GPU: tuple[Contribution, ...] = (
    Contribution(
        name="flashinfer-plan-guard",
        title="[FlashInfer] Do not plan a decode step over the copy of the last plan",
        gap="`fast_decode_plan` writes the wrapper's pinned workspace and copies it to the device without waiting. Under the overlap "
        "schedule the host plans step n + 1 while the copy for step n may still be queued: where other processes share the GPU it is, "
        "and step n runs by the schedule of n + 1. Asked for 40 prompts eight at a time beside other servers on an H100, stock 0.5.23 "
        "gave 6 to 19 answers per round that part from those it gives one at a time, by gaps of up to 3.7 in log-probability.",
        change="An event per wrapper, recorded behind each plan and waited for ahead of the next one.",
        proof="In the same minutes on the same GPU: none of 40 in eight rounds (benchmark/results/gpu_runtime_check.json, stock_answers; "
        "there the event stood in fast_decode_plan itself). On a CPU: wait, plan and mark come in this order.",
        closes="the guard of unsharded steps in upstream/layers/attention_backend.py",
        apply=plan_guard,
    ),
)
