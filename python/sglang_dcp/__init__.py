"""sglang_dcp: dynamic context parallelism for SGLang's decode, as an overlay."""
