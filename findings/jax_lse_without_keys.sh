#!/usr/bin/env bash
# JAX: the log-sum-exp of a query without keys is a finite number, and its output is the mean of the values it may not see.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

query = jnp.ones((1, 1, 2, 8))
keys = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
values = jnp.arange(64, dtype=jnp.float32).reshape(1, 4, 2, 8)


def attend(num_keys):
    output, lse = jax.nn.dot_product_attention(query, keys, values, key_value_seq_lengths=jnp.array([num_keys]), return_residual=True)
    return np.asarray(output)[0, 0], np.asarray(lse).ravel()


output, lse = attend(0)
full_output, full_lse = attend(4)
is_mean = np.allclose(output, np.asarray(values).mean(axis=1)[0])
is_finite = bool(np.isfinite(lse).all()) and bool((lse < -1e38).all())

# Merging by log-sum-exp: with a part that has keys the empty one weighs nothing; with a part whose LSE is -inf it weighs everything.
beside_minus_inf = np.exp(lse - np.logaddexp(lse, -np.inf))
print(f"version  jax {jax.__version__}")
print("guess    output 0 or NaN, log-sum-exp -inf: the neutral element of a merge")
print(f"seen     output {output[0, :3]} (the mean of all values: {is_mean}), log-sum-exp {lse[0]:.4g}; weight beside a part of -inf: {beside_minus_inf[0]:g}")
print("holds    shards of a cache that are merged by log-sum-exp: rows that no shard has keys for come out as a mean of foreign values")
raise SystemExit(0 if is_mean and is_finite and beside_minus_inf[0] == 1.0 and np.isfinite(full_lse).all() else 1)
PY
