"""torchfuse: find, prove and measure fusions in PyTorch models.

Importing it does not import torch: each verb is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchfuse.artifacts import Artifact
    from torchfuse.checking import verify
    from torchfuse.delegation import Delegation, DelegationWarning
    from torchfuse.eager import fuse_modules, fuse_modules_qat
    from torchfuse.exporting import export, load
    from torchfuse.quantizing import QuantizationResult, quantize
    from torchfuse.timing import Measurement, measure

__all__ = [
    "Artifact",
    "Delegation",
    "DelegationWarning",
    "Measurement",
    "QuantizationResult",
    "export",
    "fuse_modules",
    "fuse_modules_qat",
    "load",
    "measure",
    "quantize",
    "verify",
]

# Public name → the module that defines it. No module has the name of a public function: with lazy
# imports, `torchfuse.fuse` would become the module as soon as anything imported it.
_HOME = {
    "Artifact": "artifacts",
    "Delegation": "delegation",
    "DelegationWarning": "delegation",
    "Measurement": "timing",
    "QuantizationResult": "quantizing",
    "export": "exporting",
    "fuse_modules": "eager",
    "fuse_modules_qat": "eager",
    "load": "exporting",
    "measure": "timing",
    "quantize": "quantizing",
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
