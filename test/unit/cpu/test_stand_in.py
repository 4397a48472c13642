"""The stand-ins of sgl_kernel and flashinfer, in a process that has them on its path."""

from __future__ import annotations

import os
import subprocess
import sys

from sglang_dcp.cpu.environment import STAND_IN_FOLDER


def run(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(STAND_IN_FOLDER)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_every_name_imports_and_none_works() -> None:
    code = (
        "from sgl_kernel import silu_and_mul, some_new_name\nfrom sgl_kernel.deep.er import thing\nimport sgl_kernel\n"
        "for f in (silu_and_mul, some_new_name, thing):\n"
        "    try:\n        f(1)\n    except NotImplementedError as e:\n        print('no CUDA driver' in str(e))\n"
        "print(sgl_kernel.STAND_IN, hasattr(sgl_kernel, '__wrapped__'))"
    )
    assert run(code).splitlines() == ["True", "True", "True", "True False"]


def test_scalar_type_is_the_real_one() -> None:
    path, bits = run("import sgl_kernel.scalar_type as s; print(s.__file__); print(s.scalar_types.uint4b8.size_bits)").splitlines()
    assert bits == "4"
    assert "sgl_kernel" in path
    assert not path.startswith(str(STAND_IN_FOLDER))


def test_it_is_not_importable_otherwise() -> None:
    """Installing the package must not put the stand-in in front of the real one."""
    code = "import importlib.util; print(importlib.util.find_spec('sgl_kernel').origin)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    origin = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert "standin" not in origin


def test_flashinfer_is_as_if_it_were_not_installed() -> None:
    code = "try:\n    import flashinfer.decode\nexcept ModuleNotFoundError as error:\n    print(error.name, '|', error)"
    assert run(code) == "flashinfer | flashinfer needs CUDA; this machine has no CUDA driver"
