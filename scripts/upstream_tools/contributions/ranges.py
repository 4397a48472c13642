"""Ranges of request fields: what a scheduler cannot compute with is refused where HTTP is answered."""

from __future__ import annotations

from ..codemod import Contribution, EditedTree

SAMPLING = "sglang.srt.sampling.sampling_params"
MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"


def request_ranges(tree: EditedTree) -> None:
    _sampling(tree)
    call = """
    if isinstance(obj, GenerateReqInput):
        self._validate_ranges(obj, input_ids)
    """
    tree.insert_last(f"{MANAGER}._validate_one_request", call)
    method = '''
    def _validate_ranges(self, obj: GenerateReqInput, input_ids: List[int]) -> None:
        """Raises ValueError for what a scheduler cannot compute with: it would end there, and with it every rank."""
        internal = {"is_normalized", "stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len"}
        for name in internal & set(obj.sampling_params or {}):
            raise ValueError(f"sampling_params has no {name!r}: it is set by the server")
        vocab_size = self.model_config.vocab_size
        prompt_len = len(input_ids or ())
        # Multimodal processors put placeholders of their own into the prompt.
        if input_ids and not obj.contains_mm_input():
            if min(input_ids) < 0 or max(input_ids) >= vocab_size:
                wrong = next(i for i in input_ids if not 0 <= i < vocab_size)
                raise ValueError(
                    f"input_ids contains out-of-vocabulary token id {wrong}; valid range is [0, {vocab_size})."
                )
        ranges = [("top_logprobs_num", 0, vocab_size)]
        if obj.return_logprob:
            ranges.append(("logprob_start_len", -1, prompt_len))
        for name, low, high in ranges:
            value = getattr(obj, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} must be an integer in [{low}, {high}], got {value!r}.")
        for position in obj.token_indices_to_pool or ():
            if type(position) is not int or not 0 <= position < prompt_len:
                raise ValueError(
                    f"token_indices_to_pool must hold positions in [0, {prompt_len}), got {position!r}."
                )
        unknown = sorted(set(obj.custom_labels or ()) - set(self.metrics_collector.labels)) if self.enable_metrics else []
        if unknown:
            raise ValueError(f"custom_labels must be labels of the metrics, got {unknown[0]!r}.")
    '''
    tree.add_method(MANAGER, method)


def _sampling(tree: EditedTree) -> None:
    method = '''
    def verify_types(self):
        """Raises ValueError for a value that the typed message between processes cannot carry."""
        for name, field_type in get_type_hints(SamplingParams).items():
            try:
                msgspec.convert(getattr(self, name), field_type)
            except msgspec.ValidationError as error:
                raise ValueError(f"{name}: {error}") from None
    '''
    tree.add_method(f"{SAMPLING}.SamplingParams", method)
    tree.replace_in_module(SAMPLING, "from typing import Dict,", "from typing import get_type_hints, Dict,")
    tree.insert_first(f"{SAMPLING}.SamplingParams.normalize", "self.verify_types()\n")
    ranges = """
    if self.n < 1:
        raise ValueError(f"n must be at least 1, got {self.n}.")
    if self.top_k > TOP_K_ALL:
        raise ValueError(f"top_k must be at most {TOP_K_ALL}, got {self.top_k}.")
    for token_id in self.stop_token_ids or ():
        if not 0 <= token_id < vocab_size:
            raise ValueError(
                f"stop_token_ids must be in [0, {vocab_size - 1}], got {token_id}."
            )
    for token_id, bias in (self.logit_bias or {}).items():
        if not math.isfinite(bias):
            raise ValueError(f"logit_bias[{token_id}] must be finite, got {bias}.")
    """
    tree.insert_last(f"{SAMPLING}.SamplingParams.verify", ranges)


RANGES: tuple[Contribution, ...] = (
    Contribution(
        name="request-ranges",
        title="[Server] Validate request fields against the vocabulary, the prompt and the message types",
        gap="Token ids of a prompt and stop token ids are not compared with the vocabulary, `top_logprobs_num` and `logprob_start_len` not "
        "with their ranges. Types are compared with a schema on `/generate` alone; from other endpoints and `Engine.generate` a value of "
        "another type reaches the typed message between processes, and decoding that ends the process that reads it. With "
        "data-parallel attention all ranks end with one. With `--enable-metrics` a name in `custom_labels` that is no label of the "
        "metrics ends the main process.",
        change="`SamplingParams.normalize` compares values with the struct's own types, `verify` looks at `n`, `top_k`, "
        "`stop_token_ids` and `logit_bias`; `TokenizerManager._validate_ranges` does the rest. A ValueError takes the path of every "
        "other bad parameter: HTTP 400.",
        proof="Values one step outside are refused by name, those at the ends of their ranges pass.",
        closes="the larger part of upstream/front/request_ranges.py",
        apply=request_ranges,
    ),
)
