#!/usr/bin/env bash
# transformers: of a configuration whose layers differ in heads, getattr(config, "num_attention_heads", None) raises, and so does hasattr.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install --disable-pip-version-check transformers==5.19.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

from transformers import AutoConfig


def config(heads_in_window_layers):
    """Step-3.5's form: window layers have heads of their own number."""
    return AutoConfig.for_model(
        "step3p5",
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=128,
        num_attention_heads=8,
        num_attention_groups=2,
        attention_other_setting={"num_attention_heads": heads_in_window_layers, "num_attention_groups": 2},
    )


def ask(made, how):
    try:
        return how(made)
    except Exception as error:  # its type is what is looked at
        return type(error).__name__


asks = {
    "hasattr": lambda made: hasattr(made, "num_attention_heads"),
    "getattr with a default": lambda made: getattr(made, "num_attention_heads", None),
    "to_dict": lambda made: made.to_dict().get("num_attention_heads"),
    "layer 0": lambda made: made.per_layer_config[0].num_attention_heads,
}
seen = {heads: {name: ask(config(heads), how) for name, how in asks.items()} for heads in (8, 12)}
ambiguous = "AmbiguousGlobalPerLayerAttributeError"
print(f"version  transformers {version('transformers')}")
print("guess    a default for a missing attribute is enough to ask a configuration for its heads; hasattr never raises")
print(f"seen     by heads of the window layers, 8 in the others: {seen}")
print("holds    a server that asks every configuration for its heads ends at Step-3.5's, unless the checkpoint brings a class of its own")
equal = {"hasattr": True, "getattr with a default": 8, "to_dict": 8, "layer 0": 8}
differ = {"hasattr": ambiguous, "getattr with a default": ambiguous, "to_dict": 8, "layer 0": 12}
raise SystemExit(0 if seen == {8: equal, 12: differ} else 1)
PY
