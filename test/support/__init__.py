"""What the tests share: servers, a client, prompts and the transformers reference. Imported as `support`."""
