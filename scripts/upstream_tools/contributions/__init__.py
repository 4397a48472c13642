"""Changes that belong in SGLang, as edits that make a patch against any tree. `scripts/stage_upstream.py` is their command line."""

from __future__ import annotations

from ..codemod import Contribution
from .cpu import CPU
from .cpu_models import CPU_MODELS
from .gpu import GPU
from .ranges import RANGES
from .seams import SEAMS

ALL: tuple[Contribution, ...] = CPU + CPU_MODELS + SEAMS + RANGES + GPU
