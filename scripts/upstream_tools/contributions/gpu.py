"""What SGLang gets wrong on a GPU, found while its answers were compared with ours."""

from __future__ import annotations

from ..codemod import Contribution, EditedTree

DECODE_PLAN = "sglang.srt.layers.attention.flashinfer_backend.FlashInferIndicesUpdaterDecode.call_begin_forward"

FUSED_LOADER = "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.weight_loader_fused"


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


def fused_experts(tree: EditedTree) -> None:
    code = """\
        # The checkpoint holds all experts in one tensor, the parameter those of this rank.
        num_ranks = self.moe_ep_size
        if (
            num_ranks > 1
            and self.num_fused_shared_experts == 0
            and self.num_local_experts * num_ranks == self.num_experts
            and loaded_weight.shape[0] == self.num_experts
            and param.shape[0] == self.num_local_experts
        ):
            loaded_weight = loaded_weight.narrow(
                0, self.moe_ep_rank * self.num_local_experts, self.num_local_experts
            )

"""
    first = "        # Mirror _weight_loader_impl"
    tree.replace(FUSED_LOADER, first, code + first)


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
    Contribution(
        name="fused-experts",
        title="[MoE] Load fused bf16 experts under expert parallelism",
        gap="`weight_loader_fused` takes a tensor of all experts, as bf16 gpt-oss has it, and copies it into a parameter of this rank's: "
        'with `--ep` above 1 the model does not load ("The size of tensor a (2) must match the size of tensor b (4)"). '
        "MXFP4 checkpoints are cut by their own loader.",
        change="Where the tensor holds every expert once and the parameter an even part, the part of this rank is loaded. Redundant and "
        "shared experts are left as they are.",
        proof="The parts of one, two and four ranks are the checkpoint.",
        closes="hook FusedMoE.weight_loader_fused",
        apply=fused_experts,
    ),
)
