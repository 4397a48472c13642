"""`make demo`: starts testing/demo.py."""

from as_module import run_as_module

if __name__ == "__main__":
    run_as_module("testing.demo")
