#!/usr/bin/env bash
# sglang: of two plugins that hook one function, only one is ever called once the hooks have been applied between them, and nothing is logged.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
# Its registry of hooks needs the standard library alone.
export PIP_NO_DEPS=1
"$folder/venv/bin/pip" -q install --disable-pip-version-check sglang==0.5.23
cd "$folder"
cat > served.py <<'PY'
def first():
    return ["stock"]


def second():
    return ["stock"]
PY
"$folder/venv/bin/python" - <<'PY'
import importlib.util
import logging
import sys
from importlib.metadata import distribution

sys.path.insert(0, "")
import served

path = distribution("sglang").locate_file("sglang/srt/plugins/hook_registry.py")
spec = importlib.util.spec_from_file_location("hook_registry", path)
registry = sys.modules["hook_registry"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(registry)
messages = []
handler = logging.Handler(logging.WARNING)
handler.emit = messages.append
logging.getLogger().addHandler(handler)


def hook(target, name):
    registry.HookRegistry.register(target, lambda result: [*result, name], registry.HookType.AFTER)


hook("served.first", "one plugin")
hook("served.first", "another")
registry.HookRegistry.apply_hooks()
hook("served.second", "one plugin")
registry.HookRegistry.apply_hooks()
hook("served.second", "another")
registry.HookRegistry.apply_hooks()
seen = {"registered, registered, applied": served.first(), "registered, applied, registered, applied": served.second()}
print(f"version  sglang {distribution('sglang').version}")
print("guess    a hook that is registered later joins those that are there when hooks are applied again, or its loss is an error")
print(f"seen     {seen}; messages: {len(messages)}")
print("holds    a plugin that applies its hooks at once, to check them, takes its targets from every plugin that SGLang loads behind it")
both, one = ["stock", "one plugin", "another"], ["stock", "one plugin"]
raise SystemExit(0 if list(seen.values()) == [both, one] and not messages else 1)
PY
