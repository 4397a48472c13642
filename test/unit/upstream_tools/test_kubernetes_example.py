"""docs/kubernetes without a cluster: one command for all pods, with flags that exist and numbers that agree."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from scripts.upstream_tools.targets import REPOSITORY
from sglang_dcp.config import DynCpConfig, add_cli_arguments

SET, SERVICE = yaml.safe_load_all((REPOSITORY / "docs" / "kubernetes" / "leaderworkerset.yaml").read_text())
TEMPLATE = SET["spec"]["leaderWorkerTemplate"]


def container(role: str) -> dict[str, Any]:
    (found,) = TEMPLATE[role]["spec"]["containers"]
    return dict(found)


def test_all_pods_run_one_command_that_is_ours() -> None:
    assert container("leaderTemplate") == container("workerTemplate")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_cli_arguments(parser)
    for flag in ("--model-path", "--nnodes", "--node-rank", "--dist-init-addr", "--host", "--moe-a2a-backend"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--tp", type=int)
    parser.add_argument("--port", type=int)
    parser.add_argument("--enable-metrics", action="store_true")
    args = parser.parse_args(container("leaderTemplate")["args"])
    assert args.enable_dyncp and args.nnodes == "$(LWS_GROUP_SIZE)" and args.node_rank == "$(LWS_WORKER_INDEX)"
    gpus = int(container("leaderTemplate")["resources"]["limits"]["nvidia.com/gpu"])
    assert args.tp == TEMPLATE["size"] * gpus
    assert DynCpConfig(num_nodes=TEMPLATE["size"]).layout(args.tp).group_size == gpus
    (port,) = container("leaderTemplate")["ports"]
    assert args.port == port["containerPort"] == SERVICE["spec"]["ports"][0]["port"]


def test_pods_drain_and_start_again_together() -> None:
    assert TEMPLATE["restartPolicy"] == "RecreateGroupOnPodRestart"
    assert TEMPLATE["leaderTemplate"]["spec"]["terminationGracePeriodSeconds"] > DynCpConfig().drain_seconds
    labels = TEMPLATE["leaderTemplate"]["metadata"]["labels"]
    assert labels.items() <= SERVICE["spec"]["selector"].items(), "the service asks for leaders alone"
