"""torchfuse: find, prove and measure fusions in PyTorch models.

Importing it does not import torch: each verb is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchfuse.checking import verify
    from torchfuse.eager import fuse_modules, fuse_modules_qat
    from torchfuse.timing import Measurement, measure

__all__ = [
    "Measurement",
    "fuse_modules",
    "fuse_modules_qat",
    "measure",
    "verify",
]

# Public name → the module that defines it. No module has the name of a public function: with lazy
# imports, `torchfuse.fuse` would become the module as soon as anything imported it.
_HOME = {
    "Measurement": "timing",
    "fuse_modules": "eager",
    "fuse_modules_qat": "eager",
    "measure": "timing",
    "verify": "checking",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("torchfuse")
    try:
        home = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'torchfuse' has no attribute {name!r}") from None
    value = getattr(import_module(f"torchfuse.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
