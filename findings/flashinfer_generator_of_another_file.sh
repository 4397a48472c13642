#!/usr/bin/env bash
# FlashInfer: what the public generator of the fa2 prefill kernel builds ahead is not the file that the wrappers load.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install --disable-pip-version-check flashinfer-python==0.7.2
cd "$folder"
export FLASHINFER_WORKSPACE_BASE="$folder" FLASHINFER_CUDA_ARCH_LIST=9.0a
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from flashinfer import prefill
from flashinfer.jit import core, gen_batch_prefill_module


class AskedFor(Exception):
    """Ends a load ahead of its compilation; carries the module's name."""


def name_alone(spec):
    raise AskedFor(spec.name)


def loaded(kernel):
    """The module that a wrapper of this kernel begins to load."""
    try:
        prefill.get_batch_prefill_module(*kernel)
    except AskedFor as asked:
        return str(asked)


core.JitSpec.build_and_load = name_alone
half = torch.bfloat16
seen = {}
for backend in ("fa2", "fa3"):
    kernel = (backend, half, half, half, torch.int32, 128, 128, 0, False, False, False)
    built, wanted = gen_batch_prefill_module(*kernel).name, loaded(kernel)
    seen[backend] = "the same" if built == wanted else wanted.replace(built, "the same and ")
print(f"version  flashinfer-python {version('flashinfer-python')}")
print("guess    a module that gen_batch_prefill_module has built is the one that BatchPrefillWithPagedKVCacheWrapper loads")
print(f"seen     by backend, the name of what is loaded beside that of what was built: {seen}")
print("holds    kernels built ahead for an image are there and unused: the first request compiles for a minute, on every rank")
raise SystemExit(0 if seen == {"fa2": "the same and _kv_stride_equal", "fa3": "the same"} else 1)
PY
