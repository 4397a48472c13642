#!/usr/bin/env bash
# JAX and MLX: is_causal for one query over a cache of keys shows it the first key in one, and all keys in the other.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 mlx==0.32.4 mlx-cpu==0.32.4
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np

NUM_KEYS, NUM_QUERIES = 6, 2
# All scores are equal, so an output is the mean of the positions that the query sees.
positions = np.arange(NUM_KEYS, dtype=np.float32)
heads_inside = np.broadcast_to(positions[None, :, None, None], (1, NUM_KEYS, 1, 8)).copy()
heads_outside = np.broadcast_to(positions[None, None, :, None], (1, 1, NUM_KEYS, 8)).copy()

jax_output = jax.nn.dot_product_attention(
    jnp.zeros((1, NUM_QUERIES, 1, 8)), jnp.zeros((1, NUM_KEYS, 1, 8)), jnp.asarray(heads_inside), is_causal=True
)
mlx_output = mx.fast.scaled_dot_product_attention(
    mx.zeros((1, 1, NUM_QUERIES, 8)), mx.zeros((1, 1, NUM_KEYS, 8)), mx.array(heads_outside), scale=1.0, mask="causal"
)
seen_jax = np.asarray(jax_output)[0, :, 0, 0].tolist()
seen_mlx = np.array(mlx_output)[0, 0, :, 0].tolist()
from_start = [positions[: row + 1].mean() for row in range(NUM_QUERIES)]
from_end = [positions[: NUM_KEYS - NUM_QUERIES + row + 1].mean() for row in range(NUM_QUERIES)]
print(f"version  jax {jax.__version__}, mlx {version('mlx')}")
print("guess    causal attention of the newest queries over a longer cache means the same in both")
print(f"seen     mean position seen by {NUM_QUERIES} queries over {NUM_KEYS} keys: jax {seen_jax} (counted from the first key), mlx {seen_mlx} (from the last)")
print("holds    decode and chunked prefill carried over from one to the other attend to a handful of tokens, without an error")
raise SystemExit(0 if np.allclose(seen_jax, from_start) and np.allclose(seen_mlx, from_end) else 1)
PY
