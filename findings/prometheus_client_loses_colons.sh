#!/usr/bin/env bash
# prometheus_client: a metric "app:queue" is served as app_queue to whoever asks for OpenMetrics, under metadata of app:queue.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install --disable-pip-version-check prometheus_client==0.26.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import choose_encoder

registry = CollectorRegistry()
Gauge("app:queue", "Requests that wait.", registry=registry).set(3)


def names(accept):
    """(name in the metadata, name of the sample)."""
    encode, _ = choose_encoder(accept)
    lines = encode(registry).decode().splitlines()
    typed = next(line.split()[2] for line in lines if line.startswith("# TYPE"))
    return typed, next(line.split()[0] for line in lines if not line.startswith("#"))


seen = {accept: names(accept) for accept in ("text/plain; version=0.0.4", "application/openmetrics-text; version=1.0.0")}
print(f"version  prometheus_client {version('prometheus_client')}")
print("guess    a colon is legal in a metric's name, so both formats carry the same name")
print(f"seen     (name of the metadata, of the sample): {seen}")
print("holds    curl shows app:queue; Prometheus, which asks for OpenMetrics first, stores app_queue, and dashboards that ask as curl showed find nothing")
raise SystemExit(0 if list(seen.values()) == [("app:queue", "app:queue"), ("app:queue", "app_queue")] else 1)
PY
