"""Measures the CUDA kernels, one module per kind."""
