"""`make results`: starts scripts/result_pages."""

from as_module import run_as_module

if __name__ == "__main__":
    run_as_module("scripts.result_pages")
