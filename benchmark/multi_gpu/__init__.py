"""What scripts/multi_gpu_report.py does on several GPUs of one host, part by part. docs/multi_gpu.md says how to read it."""
