"""Benchmark clients as people run them: how each is called, and what its report calls time per token."""
