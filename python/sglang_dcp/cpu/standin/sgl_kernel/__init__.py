"""Import stand-in for `sgl_kernel` on a machine without a CUDA driver, where the real package fails to load its libraries.

`sglang-dcp serve` puts the folder above on PYTHONPATH when, and only when, no CUDA driver is there. Every name imports; calling
one raises. `scalar_type` is the real file, because SGLang builds tables from it at import. Nothing is registered under
`torch.ops.sgl_kernel`, so SGLang's own test for the AMX kernels stays false.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types

STAND_IN = True
__version__ = "0.0.0+standin"


def _missing(name):
    def refuse(*_args, **_kwargs):
        raise NotImplementedError(f"{name} needs CUDA; this machine has no CUDA driver and runs the sgl_kernel stand-in of sglang_dcp")

    refuse.__name__ = name.rpartition(".")[2]
    return refuse


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _missing(f"sgl_kernel.{name}")


class _StandInModule(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing(f"{self.__name__}.{name}")


def _real_file(name):
    """The file of the real package, wherever it is installed beside SGLang."""
    own = os.path.dirname(os.path.abspath(__file__))
    for folder in sys.path:
        path = os.path.join(folder, "sgl_kernel", name)
        if os.path.isfile(path) and os.path.dirname(os.path.abspath(path)) != own:
            return path
    raise ImportError(f"sgl_kernel/{name} of the real package was not found on sys.path; install sglang-kernel")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path, target=None):
        if fullname == "sgl_kernel.scalar_type":
            return importlib.util.spec_from_file_location(fullname, _real_file("scalar_type.py"))
        if fullname.startswith("sgl_kernel."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        module = _StandInModule(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Finder())
