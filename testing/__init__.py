"""What tests and benchmarks share, never installed: servers, a client, prompts and the transformers reference."""
