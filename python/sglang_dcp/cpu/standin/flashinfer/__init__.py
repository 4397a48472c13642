"""Hides `flashinfer` on a machine without a CUDA driver, as if it were not installed: SGLang's own wheels for a CPU come without it.

Importing it took a seventh of the time that each process of a server needs to import SGLang, and nothing on a CPU calls it.
"""

raise ModuleNotFoundError("flashinfer needs CUDA; this machine has no CUDA driver", name="flashinfer")
