"""Everything that needs several GPUs, in one call: starts benchmark/multi_gpu/__main__.py. docs/multi_gpu.md describes it."""

from as_module import run_as_module

if __name__ == "__main__":
    run_as_module("benchmark.multi_gpu")
