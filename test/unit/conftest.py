"""Properties are tried on the same examples in every run, and no example fails for being slow: the machine may be busy."""

from hypothesis import settings

settings.register_profile("deterministic", deadline=None, derandomize=True)
settings.load_profile("deterministic")
