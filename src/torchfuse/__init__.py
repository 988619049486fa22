"""torchfuse: find, prove and measure fusions in PyTorch models.

Importing it does not import torch: each verb is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchfuse.artifacts import Artifact
    from torchfuse.cases import Case
    from torchfuse.comparing.comparison import Comparison
    from torchfuse.comparing.fastest import Fastest, export_fastest
    from torchfuse.comparing.variants import compare
    from torchfuse.delegation import Delegation, DelegationWarning
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
    from torchfuse.exporting.model_files import export, load
    from torchfuse.fusing.by_name import fuse_modules, fuse_modules_qat
    from torchfuse.fusing.checkpoints import load_unfused_state_dict
    from torchfuse.fusing.model_fusing import fuse, plan, unfuse
    from torchfuse.fusing.programs.program_fusing import fuse_exported
    from torchfuse.measuring.timing import Measurement, measure
    from torchfuse.planning import Fusion, FusionPlan, FusionResult, Skip
    from torchfuse.quantizing import QuantizationResult, quantize
    from torchfuse.quantizing.preprocessing import Preprocessing, WithPreprocessing
    from torchfuse.quantizing.quantization_report import QuantizationReport
    from torchfuse.quantizing.training import convert_qat, prepare_qat
    from torchfuse.targets.torchscript.mobile_optimizer import optimize_for_mobile
    from torchfuse.verifying.equivalence import Equivalence, OutputDifference
    from torchfuse.verifying.outputs import verify

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
    "Case": "cases",
    "ArtifactError": "errors",
    "CalibrationError": "errors",
    "CaptureError": "errors",
    "Comparison": "comparing.comparison",
    "Delegation": "delegation",
    "DelegationWarning": "delegation",
    "DeviceError": "errors",
    "Equivalence": "verifying.equivalence",
    "ExportWarning": "errors",
    "Fastest": "comparing.fastest",
    "Fusion": "planning",
    "FusionError": "errors",
    "FusionPlan": "planning",
    "FusionResult": "planning",
    "FusionWarning": "errors",
    "InputError": "errors",
    "Measurement": "measuring.timing",
    "OutputDifference": "verifying.equivalence",
    "Preprocessing": "quantizing.preprocessing",
    "QuantizationReport": "quantizing.quantization_report",
    "QuantizationWarning": "errors",
    "WithPreprocessing": "quantizing.preprocessing",
    "QuantizationResult": "quantizing",
    "Skip": "planning",
    "TorchfuseError": "errors",
    "UnsupportedError": "errors",
    "compare": "comparing.variants",
    "export": "exporting.model_files",
    "export_fastest": "comparing.fastest",
    "fuse": "fusing.model_fusing",
    "fuse_exported": "fusing.programs.program_fusing",
    "fuse_modules": "fusing.by_name",
    "fuse_modules_qat": "fusing.by_name",
    "load": "exporting.model_files",
    "load_unfused_state_dict": "fusing.checkpoints",
    "measure": "measuring.timing",
    "optimize_for_mobile": "targets.torchscript.mobile_optimizer",
    "plan": "fusing.model_fusing",
    "convert_qat": "quantizing.training",
    "prepare_qat": "quantizing.training",
    "quantize": "quantizing",
    "unfuse": "fusing.model_fusing",
    "verify": "verifying.outputs",
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
