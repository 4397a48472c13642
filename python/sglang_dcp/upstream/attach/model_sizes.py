"""The served model's sizes, read in the main process, for the constants that every process places by."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

import torch

from sglang_dcp.config import CONFIG_VARIABLE, ConfigError, DynCpConfig
from sglang_dcp.policy.served_model import CPU_MODEL, ServedModel, served_cost
from sglang_dcp.upstream.attach.cuda_settings import QUANTISED_KV

logger = logging.getLogger(__name__)


def learn_served_model(server_args: Any, device: str) -> None:
    """At the end of SGLang's resolution: adds the model to the configuration that child processes get, and says what is placed by.

    A model without the sizes is left to the check of its layers, which names it.
    """
    config: DynCpConfig = server_args._dyncp
    if config.served_model is not None:
        return
    from sglang.srt.arg_groups.model_override_base import model_config_of

    try:
        model = model_config_of(server_args)
        kv_bytes = kv_element_bytes(server_args.kv_cache_dtype, model.hf_config)
        served = ServedModel.of_config(model.hf_text_config, card_name(device), kv_bytes)
        # LongCat attends twice in a layer.
        served = dataclasses.replace(served, num_layers=model.num_attention_layers)
    except AttributeError as error:
        logger.warning("dyncp: the model's sizes are not known (%s); requests are placed by constants of a tiny model", error)
        return
    server_args._dyncp = dataclasses.replace(config, served_model=served)
    os.environ[CONFIG_VARIABLE] = server_args._dyncp.to_json()
    announce(config.cost_model, served)


def card_name(device: str) -> str:
    """As ServedModel wants it."""
    return torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else CPU_MODEL


def kv_element_bytes(kv_cache_dtype: str, config: Any) -> int:
    """Bytes of an element of K/V in the pool: --kv-cache-dtype's, or what SGLang makes of "auto" with a checkpoint that asks for FP8."""
    asked = getattr(config, "quantization_config", None) or {}
    is_asked = kv_cache_dtype == "auto" and str(asked.get("kv_cache_quant_algo")).upper() == "FP8"
    return 1 if kv_cache_dtype == QUANTISED_KV or is_asked else 2


def announce(given: str | None, served: ServedModel) -> None:
    """Says what requests are placed by. Raises ConfigError for a file of constants that cannot be read."""
    try:
        cost = served_cost(given, served, 1)  # what is said does not depend on the number of instances
    except ValueError as error:
        raise ConfigError(f"--dyncp-cost-model {given!r} does not work: {error}") from error
    logger.info("dyncp: cost model %s", cost.description)
    for warning in cost.warnings:
        logger.warning("dyncp: %s; set your own with --dyncp-cost-model (see sglang-dcp calibrate)", warning)
