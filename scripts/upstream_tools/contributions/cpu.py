"""What SGLang lacks on a CPU for data-parallel attention with expert parallelism (python/sglang_dcp/cpu/hooks.py)."""

from __future__ import annotations

from ..codemod import Contribution, EditedTree

STATE = "sglang.srt.distributed.parallel_state"
GROUP = f"{STATE}.GroupCoordinator"
EXPERTS = "sglang.srt.layers.moe.fused_moe_native.moe_forward_native"
TORCH_NATIVE = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
HANDLERS = "sglang.srt.models.deepseek_common.attention_backend_handler"
CONTROLLER = "sglang.srt.managers.data_parallel_controller.DataParallelController"

REDUCE_SCATTER = '''
def _reduce_scatterv_without_nccl(self, input_, output=None, sizes=None):
    """reduce_scatterv by an all-reduce, for backends such as gloo that have no variable-size collective."""
    if sizes is None:
        assert input_.shape[0] % self.world_size == 0
        sizes = [input_.shape[0] // self.world_size] * self.world_size
    assert len(sizes) == self.world_size and input_.shape[0] == sum(sizes)
    summed = input_.clone()
    torch.distributed.all_reduce(summed, group=self.device_group)
    part = summed.split(list(sizes))[self.rank_in_group]
    return part.clone() if output is None else output.copy_(part)
'''

ALL_GATHER = '''
def _all_gatherv_without_nccl(self, input_, sizes=None, output=None):
    """all_gatherv by an all-gather of padded rows, for backends such as gloo that have no variable-size collective."""
    inputs = [input_] if isinstance(input_, torch.Tensor) else list(input_)
    assert output is None or len(inputs) == 1
    gathered = []
    for rows in inputs:
        counts = list(sizes) if sizes is not None else [rows.shape[0]] * self.world_size
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(parts, padded, group=self.device_group)
        gathered.append(torch.cat([part[:n] for part, n in zip(parts, counts)]))
    return [output.copy_(gathered[0])] if output is not None else gathered
'''


def collectives(tree: EditedTree) -> None:
    tree.replace(f"{STATE}.init_model_parallel_group", 'backend == "mooncake"', 'backend in ("mooncake", "gloo")')
    tree.insert_first(
        f"{GROUP}.reduce_scatterv", "if self.pynccl_comm is None:\n    return self._reduce_scatterv_without_nccl(input_, output, sizes)\n"
    )
    tree.insert_first(
        f"{GROUP}.all_gatherv", "if self.pynccl_comm is None:\n    return self._all_gatherv_without_nccl(input_, sizes, output)\n"
    )
    tree.add_method(GROUP, REDUCE_SCATTER)
    tree.add_method(GROUP, ALL_GATHER)


def experts(tree: EditedTree) -> None:
    code = """
    # Expert parallelism marks experts of other ranks with -1: their weight here is zero, so any local expert may stand in.
    is_local = topk_ids >= 0
    topk_weights = topk_weights.masked_fill(~is_local, 0)
    topk_ids = topk_ids.masked_fill(~is_local, 0)
    """
    tree.insert_after(EXPERTS, "topk_weights, topk_ids, _ = topk_output", code)
    # A token may now choose its stand-in more than once, so choices are counted, not marked.
    tree.replace(
        EXPERTS,
        "cnts.scatter_(1, topk_ids.to(torch.int64), 1)",
        "cnts.scatter_add_(1, topk_ids.to(torch.int64), torch.ones_like(topk_ids))",
    )


def torch_native(tree: EditedTree) -> None:
    fill_value = """
    def get_cpu_graph_seq_len_fill_value(self):
        # A padding row needs one key: softmax over nothing is NaN.
        return 1
    """
    tree.add_method(TORCH_NATIVE, fill_value)
    handler = """
    def handle_attention_torch_native(attn, forward_batch):
        # The pool holds the latent, so prefill is absorbed, too.
        return AttnForwardMethod.MLA


    AttentionBackendRegistry.register("torch_native", handle_attention_torch_native)
    """
    tree.add_to_module(HANDLERS, handler)


def controller_waits(tree: EditedTree) -> None:
    code = """
    while True:
        self.soft_watchdog.feed()
        # Wait for a message instead of spinning: the core is needed elsewhere.
        if not self.recv_from_tokenizer.poll(timeout=20):
            continue
        while True:
            try:
                recv_req = sock_recv(self.recv_from_tokenizer, flags=zmq.NOBLOCK)
            except zmq.ZMQError:
                break
            self._request_dispatcher(recv_req)
    """
    tree.replace_body(f"{CONTROLLER}.event_loop", code)


CPU: tuple[Contribution, ...] = (
    Contribution(
        name="cpu-collectives",
        title="[CPU] Variable-size collectives and group set-up without NCCL",
        gap="With `--device cpu` and data-parallel attention, group set-up asks for a NCCL communicator on a gloo group (only "
        "NPU, XPU and mooncake are "
        "exempt), and `reduce_scatterv` and `all_gatherv` dereference a missing one: AttributeError in the first prefill of "
        "unequal batches.",
        change="gloo joins the exempt backends. Both collectives fall back to an all-reduce and a padded all-gather where the "
        "group has no NCCL "
        "communicator. Nothing changes where it has one.",
        proof="A group of gloo ranks comes up without libnccl; both collectives return what NCCL's would on a group of one, "
        "and on two ranks with unequal sizes.",
        closes="hooks GroupCoordinator.__init__, reduce_scatterv, all_gatherv",
        apply=collectives,
    ),
    Contribution(
        name="cpu-experts",
        title="[CPU] Native MoE forward accepts experts of other ranks",
        gap="With expert parallelism, `topk_ids` holds -1 for experts of other ranks; `moe_forward_native` scatters with it: "
        "index -1 is out of bounds.",
        change="Such choices get weight zero and a local stand-in before the loop, and choices are counted instead of marked. "
        "Results without -1 are unchanged.",
        proof="The sum over two ranks of outputs with -1 equals one rank's output with all experts.",
        closes="hook moe_forward_native",
        apply=experts,
    ),
    Contribution(
        name="cpu-torch-native",
        title="[CPU] torch_native: padding of idle batches, and MLA",
        gap="ForwardBatch asks the backend for `get_cpu_graph_seq_len_fill_value` whenever it pads a batch on a CPU; "
        "torch_native lacks it. For MLA models torch_native has no "
        "handler and inherits triton's, which picks the multi-head form for a prefill without prefix and writes 48-wide keys "
        "into the 80-wide latent pool.",
        change="The backend gets the fill value 1, the registry a handler that always picks the absorbed form.",
        proof="Qwen3-MoE on two and four ranks and DeepSeek-V2 on two serve prefill and decode on a CPU.",
        closes="hooks TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value, AttentionBackendRegistry.register",
        apply=torch_native,
    ),
    Contribution(
        name="controller-waits",
        title="Data-parallel controller waits on its socket",
        gap="`DataParallelController.event_loop` receives without blocking in a loop and keeps one core busy for the life of the server.",
        change="It polls the socket with a timeout of 20 ms, then drains it as before. The watchdog is fed as often as the timeout.",
        proof="Messages are dispatched in order; an idle controller uses no CPU time to speak of.",
        closes="hook DataParallelController.event_loop",
        apply=controller_waits,
    ),
)
