"""SGLang's own behaviour beside ours: the same requests to a stock server and to one with --enable-dyncp."""
