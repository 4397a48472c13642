"""What do benchmark clients call time per token? Starts scripts/client_runs."""

from as_module import run_as_module

if __name__ == "__main__":
    run_as_module("scripts.client_runs")
