"""Tries the staged ranges of request fields on a patched SGLang; `seam_probe.py` runs it."""

import types


def sampling(**values):
    from sglang.srt.sampling.sampling_params import SamplingParams

    params = SamplingParams(**values)
    params.normalize(types.SimpleNamespace(encode=lambda text, add_special_tokens: [1]))
    params.verify(vocab_size=8)


def prompt(ids, **values):
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    request = GenerateReqInput(input_ids=ids, **values)
    request.normalize_batch_and_arguments()
    metrics = types.SimpleNamespace(labels={"model_name": "x", "tier": ""})
    manager = types.SimpleNamespace(model_config=types.SimpleNamespace(vocab_size=8), enable_metrics=True, metrics_collector=metrics)
    TokenizerManager._validate_ranges(manager, request, ids)


def refused(call, expected):
    try:
        call()
    except ValueError as error:
        return expected in str(error) or str(error)
    return "passes"


def all_hold(outcomes):
    return next((found for found in outcomes if found is not True), True)


def sampling_values_out_of_range_are_refused():
    cases = [
        ({"top_k": 40.0}, "top_k: Expected `int`"),
        ({"custom_params": {"a": {"b": [1]}}}, "custom_params: Expected"),
        ({"top_k": 2**30 + 1}, "top_k must be at most"),
        ({"stop_token_ids": [8]}, "stop_token_ids must be in [0, 7], got 8"),
        ({"logit_bias": {"3": float("nan")}}, "logit_bias[3] must be finite"),
        ({"n": 0}, "n must be at least 1"),
    ]
    return all_hold(refused(lambda values=values: sampling(**values), expected) for values, expected in cases)


def sampling_values_in_range_pass():
    sampling()
    sampling(top_k=-1, n=2, temperature=1, stop_token_ids=[0, 7], logit_bias={"7": 1}, stop=["a"], custom_params={"a": {"b": 1}})
    return True


def prompts_out_of_range_are_refused():
    cases = [
        (([1, 8], {}), "out-of-vocabulary token id 8"),
        (([1, -1], {}), "out-of-vocabulary token id -1"),
        (([1], {"custom_labels": {"tier": "a", "team": "b"}}), "custom_labels must be labels of the metrics, got 'team'"),
        (([1], {"top_logprobs_num": 9}), "top_logprobs_num must be an integer in [0, 8], got 9"),
        (([1], {"top_logprobs_num": [2]}), "top_logprobs_num must be an integer"),
        (([1], {"logprob_start_len": 2, "return_logprob": True}), "logprob_start_len must be an integer in [-1, 1], got 2"),
        (([1], {"token_indices_to_pool": [1]}), "positions in [0, 1), got 1"),
        (([1], {"sampling_params": {"is_normalized": True}}), "it is set by the server"),
    ]
    return all_hold(refused(lambda ids=ids, values=values: prompt(ids, **values), expected) for (ids, values), expected in cases)


def prompts_in_range_pass():
    prompt([0, 7], top_logprobs_num=8, logprob_start_len=2, return_logprob=True, token_indices_to_pool=[0, 1])
    prompt([0], logprob_start_len=900)
    return True


ATTEMPTS = (
    sampling_values_out_of_range_are_refused,
    sampling_values_in_range_pass,
    prompts_out_of_range_are_refused,
    prompts_in_range_pass,
)
