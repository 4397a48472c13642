"""Random steps for the CUDA kernels, and instances that share a process."""
