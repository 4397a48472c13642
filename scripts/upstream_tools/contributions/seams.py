"""Seams that plugins need: flags, validation, placement, idle ranks, log-sum-exp of a decode backend."""

from __future__ import annotations

from ..codemod import Contribution, EditedTree
from .cpu import CONTROLLER, TORCH_NATIVE

ARGS = "sglang.srt.server_args.ServerArgs"
PLUGINS = "sglang.srt.plugins"
SAMPLING = "sglang.srt.sampling.sampling_params"
SYNC = "sglang.srt.managers.scheduler_components.dp_attn"
CONTROLLER_MODULE = "sglang.srt.managers.data_parallel_controller"


def plugin_flags(tree: EditedTree) -> None:
    registry = '''
    _cli_args: list[tuple[Callable[[Any], None], Callable[[Any, Any], None]]] = []


    def register_cli_args(
        add: Callable[[Any], None], read: Callable[[Any, Any], None]
    ) -> None:
        """Declare command-line flags of a plugin.

        ``add(parser)`` adds arguments; ``read(server_args, namespace)`` gets what was parsed.
        """
        if (add, read) not in _cli_args:
            _cli_args.append((add, read))


    def add_plugin_cli_args(parser: Any) -> None:
        for add, _ in _cli_args:
            add(parser)


    def read_plugin_cli_args(server_args: Any, namespace: Any) -> None:
        for _, read in _cli_args:
            read(server_args, namespace)
    '''
    tree.add_to_module(PLUGINS, registry)
    tree.insert_last(f"{ARGS}.add_cli_args", "from sglang.srt.plugins import add_plugin_cli_args\n\nadd_plugin_cli_args(parser)\n")
    tree.replace(f"{ARGS}.from_cli_args", "return cls(", "server_args = cls(")
    read = "from sglang.srt.plugins import read_plugin_cli_args\n\nread_plugin_cli_args(server_args, args)\nreturn server_args\n"
    tree.insert_last(f"{ARGS}.from_cli_args", read)


def custom_params(tree: EditedTree) -> None:
    registry = '''
    _custom_params_checks = []


    def register_custom_params_check(check) -> None:
        """``check(custom_params)`` runs when a request is verified, in the process that answers HTTP.

        A ValueError becomes HTTP 400, also for streams.
        """
        if check not in _custom_params_checks:
            _custom_params_checks.append(check)
    '''
    tree.add_before(f"{SAMPLING}.SamplingParams", registry)
    tree.insert_first(f"{SAMPLING}.SamplingParams.verify", "for check in _custom_params_checks:\n    check(self.custom_params)\n")


def placement(tree: EditedTree) -> None:
    registry = '''
    _placement_policy_factory = None


    def register_placement_policy(factory) -> None:
        """``factory(controller)`` returns an object with ``place(req, load_snapshots)``.

        It sets ``req.routed_dp_rank``, and may put further ranks that share the request's KV cache into ``req.kv_hints``.
        A request that it leaves without a rank goes round robin.
        """
        global _placement_policy_factory
        _placement_policy_factory = factory
    '''
    tree.add_before(CONTROLLER, registry)
    choose = """
    self.placement_policy = None
    if _placement_policy_factory is not None:
        self.placement_policy = _placement_policy_factory(self)
        self.dispatching = self.placed_scheduler
        self.refresh_load_budget_on_dispatch = True
    """
    tree.insert_after(f"{CONTROLLER}.__init__", "self.refresh_load_budget_on_dispatch =", choose)
    method = """
    def placed_scheduler(self, req: Req):
        if req.routed_dp_rank is None:
            self.placement_policy.place(req, self.load_snapshot_reader.read_all())
        if not self.maybe_external_dp_rank_routing(req):
            self.round_robin_scheduler(req)
    """
    tree.add_method(CONTROLLER, method)


def idle_floor(tree: EditedTree) -> None:
    registry = '''
    _idle_rank_floors = []


    def register_idle_rank_floor(needs_all_ranks: Callable[[], bool]) -> None:
        """``needs_all_ranks()`` is asked once per step, with the same answer on every rank.

        While it is true and any rank has tokens, a rank without tokens runs one dummy token, so that it takes part in
        exchanges inside attention layers.
        """
        _idle_rank_floors.append(needs_all_ranks)
    '''
    tree.add_before(f"{SYNC}.MLPSyncBatchInfo", registry)
    method = """
    def apply_idle_rank_floor(self):
        # Never when all are idle: an idle batch would be asked for again and again.
        if max(self.global_num_tokens) == 0 or not any(
            needs_all_ranks() for needs_all_ranks in _idle_rank_floors
        ):
            return
        self.global_num_tokens = [max(1, count) for count in self.global_num_tokens]
        self.num_tokens = max(1, self.num_tokens)
    """
    tree.add_method(f"{SYNC}.MLPSyncBatchInfo", method)
    tree.insert_last(f"{SYNC}.MLPSyncBatchInfo.all_gather", "self.apply_idle_rank_floor()\n")


def decode_lse(tree: EditedTree) -> None:
    run, decode = f"{TORCH_NATIVE}._run_sdpa_forward_decode", f"{TORCH_NATIVE}.forward_decode"
    last_parameter = "sliding_window_size: Optional[int] = None,\n"
    tree.replace(run, f"{last_parameter}    ):", f"{last_parameter}        lse: Optional[torch.Tensor] = None,\n    ):")
    compute = """
    if lse is not None:
        lse[start_q:end_q] = self._log_sum_exp(
            per_req_query, per_req_key, scaling, attn_mask
        )
    """
    tree.insert_after(run, "output[start_q:end_q, :, :] =", compute)
    method = '''
    @staticmethod
    def _log_sum_exp(query, key, scaling, attn_mask) -> torch.Tensor:
        """Natural log of the sum of exp(logits), [tokens, heads] in float32, to merge attention over parts of the keys."""
        key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        logits = torch.matmul(query.float(), key.float().transpose(-1, -2)) * scale
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        return torch.logsumexp(logits, dim=-1).movedim(0, 1)
    '''
    tree.add_method(TORCH_NATIVE, method)
    tree.replace(decode, "save_kv_cache=True,\n    ):", "save_kv_cache=True,\n        return_lse: bool = False,\n    ):")
    lse = """
    lse = (
        q_.new_empty(q_.shape[:2], dtype=torch.float32) if return_lse else None
    )
    """
    tree.insert_after(decode, "o_ =", lse)
    tree.replace(decode, "causal=False,", "causal=False,\n            lse=lse,")
    tree.replace(decode, "return o\n", "return (o, lse) if return_lse else o\n")


SEAMS: tuple[Contribution, ...] = (
    Contribution(
        name="plugin-flags",
        title="[Plugins] Let plugins declare command-line flags",
        gap="A plugin can hook functions but not add a flag: it has to patch `ServerArgs.add_cli_args` and `from_cli_args`.",
        change="`sglang.srt.plugins.register_cli_args(add, read)`. Both functions of ServerArgs call what was registered.",
        proof="A flag declared in a plugin is parsed and handed over; without a plugin the parser is what it was.",
        closes="hook set flags (both hooks)",
        apply=plugin_flags,
    ),
    Contribution(
        name="custom-params-check",
        title="[Plugins] Validate custom_params where HTTP is answered",
        gap="`custom_params` are passed on unchecked. What a scheduler refuses later is HTTP 400 without streaming, but 200 "
        "and an error event with it.",
        change="`register_custom_params_check(check)`; `SamplingParams.verify` runs the checks, and their ValueError takes "
        "the path of every other bad parameter.",
        proof="A registered check turns a bad value into ValueError from `verify`; without checks nothing changes.",
        closes="the part of the main-process hooks that reads custom_params",
        apply=custom_params,
    ),
    Contribution(
        name="placement-policy",
        title="[DP] A seam for placement policies in the data-parallel controller",
        gap="`--load-balance-method` is a closed list of rules for one rank per request. A policy that also chooses the ranks "
        "which share a request's KV cache (its degree) has "
        "to replace bound methods of the controller.",
        change="`register_placement_policy(factory)`: the policy sees the request and all load snapshots, sets the rank and, "
        "as KV hints, further ranks.",
        proof="A registered policy's rank is used; a request that it leaves alone goes round robin; without a policy the "
        "dispatch is what it was.",
        closes="hook DataParallelController.__init__",
        apply=placement,
    ),
    Contribution(
        name="idle-rank-floor",
        title="[DP attention] Let idle ranks take part in exchanges inside attention",
        gap="A rank without tokens skips its attention layers in eager steps. Any exchange between ranks inside attention "
        "then waits for ever.",
        change="`register_idle_rank_floor(needs_all_ranks)`: in steps that need it, idle ranks run one dummy token. The "
        "default never does.",
        proof="Token counts are raised to one in steps that ask for it, never when all ranks are idle.",
        closes="a part of hook MLPSyncBatchInfo.all_gather",
        apply=idle_floor,
    ),
    Contribution(
        name="torch-native-lse",
        title="[Attention] torch_native decode can return the log-sum-exp",
        gap="Merging attention over parts of the keys needs the LSE of each part; decode backends compute and drop it, "
        "torch_native does not compute it.",
        change="`forward_decode(..., return_lse=True)` also returns it: natural logarithm, [tokens, heads], float32. The "
        "default path is unchanged.",
        proof="Two halves of the keys merged by LSE equal attention over all keys.",
        closes="nothing of ours on a CPU (we bring our own partial attention); the same argument for flashinfer would let adapters go",
        apply=decode_lse,
    ),
)
