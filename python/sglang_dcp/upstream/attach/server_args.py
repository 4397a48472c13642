"""Our flags on SGLang's command line, and what they make of its settings."""

from __future__ import annotations

import argparse
import os
from typing import Any

from sglang_dcp.config import CONFIG_VARIABLE, ConfigError, DynCpConfig, add_cli_arguments
from sglang_dcp.upstream.attach.widths import GIVEN, note_given_widths
from sglang_dcp.upstream.disaggregation.sending import mark_prefill_server
from sglang_dcp.upstream.ending.temporary_folders import share_folder
from sglang_dcp.upstream.front.tokenizer_workers import select_worker_app


def add_flags(result: Any, parser: argparse.ArgumentParser) -> None:
    """AFTER ServerArgs.add_cli_args."""
    add_cli_arguments(parser)
    note_given_widths(parser)


def read_flags(server_args: Any, cls: type, args: argparse.Namespace) -> Any:
    """AFTER ServerArgs.from_cli_args: keeps the configuration on the arguments and hands it to child processes."""
    try:
        config = DynCpConfig.from_namespace(args)
    except ConfigError as error:
        raise SystemExit(f"sglang_dcp: {error}") from error
    os.environ.pop(CONFIG_VARIABLE, None)
    mark_prefill_server(server_args.disaggregation_mode == "prefill")
    select_worker_app(config is not None and server_args.tokenizer_worker_num > 1)
    server_args._dyncp = config
    server_args._dyncp_given_widths = getattr(args, GIVEN, frozenset())
    if config is not None:
        from sglang_dcp.upstream.attach.hooks import DYNCP_HOOKS
        from sglang_dcp.upstream.attach.install import install
        from sglang_dcp.upstream.attach.main_hooks import DYNCP_MAIN_HOOKS

        os.environ[CONFIG_VARIABLE] = config.to_json()
        share_folder()
        install(DYNCP_HOOKS + DYNCP_MAIN_HOOKS)
    return server_args
