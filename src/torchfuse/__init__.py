"""torchfuse: find, prove and measure fusions in PyTorch models.

Importing it does not import torch: each verb is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchfuse.artifacts import Artifact
    from torchfuse.checking import verify
    from torchfuse.checkpoints import load_unfused_state_dict
    from torchfuse.choosing import Fastest, export_fastest
    from torchfuse.comparing import compare
    from torchfuse.comparison import Comparison
    from torchfuse.delegation import Delegation, DelegationWarning
    from torchfuse.eager import fuse_modules, fuse_modules_qat
    from torchfuse.equivalence import Equivalence, OutputDifference
    from torchfuse.errors import (
        ArtifactError,
        CalibrationError,
        CaptureError,
        DeviceError,
        ExportWarning,
        FusionError,
        FusionWarning,
        InputError,
        QuantizationWarning,
        TorchfuseError,
        UnsupportedError,
    )
    from torchfuse.exported.program_fusing import fuse_exported
    from torchfuse.exporting import export, load
    from torchfuse.fusing import (
        fuse,
        plan,
        unfuse,
    )
    from torchfuse.inputs import Case
    from torchfuse.planning import Fusion, FusionPlan, FusionResult, Skip
    from torchfuse.quantizing import QuantizationResult, quantize
    from torchfuse.quantizing.preprocessing import Preprocessing, WithPreprocessing
    from torchfuse.quantizing.report import QuantizationReport
    from torchfuse.quantizing.training import convert_qat, prepare_qat
    from torchfuse.targets.torchscript.mobile_optimizer import optimize_for_mobile
    from torchfuse.timing import Measurement, measure

__all__ = [
    "Artifact",
    "ArtifactError",
    "CalibrationError",
    "CaptureError",
    "Case",
    "Comparison",
    "Delegation",
    "DelegationWarning",
    "DeviceError",
    "Equivalence",
    "ExportWarning",
    "Fastest",
    "Fusion",
    "FusionError",
    "FusionPlan",
    "FusionResult",
    "FusionWarning",
    "InputError",
    "Measurement",
    "OutputDifference",
    "Preprocessing",
    "QuantizationReport",
    "QuantizationResult",
    "QuantizationWarning",
    "Skip",
    "TorchfuseError",
    "UnsupportedError",
    "WithPreprocessing",
    "compare",
    "convert_qat",
    "export",
    "export_fastest",
    "fuse",
    "fuse_exported",
    "fuse_modules",
    "fuse_modules_qat",
    "load",
    "load_unfused_state_dict",
    "measure",
    "optimize_for_mobile",
    "plan",
    "prepare_qat",
    "quantize",
    "unfuse",
    "verify",
]

# Public name → the module that defines it. No module has the name of a public function: with lazy
# imports, `torchfuse.fuse` would become the module as soon as anything imported it.
_HOME = {
    "Artifact": "artifacts",
    "Case": "inputs",
    "ArtifactError": "errors",
    "CalibrationError": "errors",
    "CaptureError": "errors",
    "Comparison": "comparison",
    "Delegation": "delegation",
    "DelegationWarning": "delegation",
    "DeviceError": "errors",
    "Equivalence": "equivalence",
    "ExportWarning": "errors",
    "Fastest": "choosing",
    "Fusion": "planning",
    "FusionError": "errors",
    "FusionPlan": "planning",
    "FusionResult": "planning",
    "FusionWarning": "errors",
    "InputError": "errors",
    "Measurement": "timing",
    "OutputDifference": "equivalence",
    "Preprocessing": "quantizing.preprocessing",
    "QuantizationReport": "quantizing.report",
    "QuantizationWarning": "errors",
    "WithPreprocessing": "quantizing.preprocessing",
    "QuantizationResult": "quantizing",
    "Skip": "planning",
    "TorchfuseError": "errors",
    "UnsupportedError": "errors",
    "compare": "comparing",
    "export": "exporting",
    "export_fastest": "choosing",
    "fuse": "fusing",
    "fuse_exported": "exported.program_fusing",
    "fuse_modules": "eager",
    "fuse_modules_qat": "eager",
    "load": "exporting",
    "load_unfused_state_dict": "checkpoints",
    "measure": "timing",
    "optimize_for_mobile": "targets.torchscript.mobile_optimizer",
    "plan": "fusing",
    "convert_qat": "quantizing.training",
    "prepare_qat": "quantizing.training",
    "quantize": "quantizing",
    "unfuse": "fusing",
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
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})
