"""Making an ExecuTorch program: captured in the precision asked for, lowered, loaded."""

from importlib.metadata import version

from torchfuse.delegation import Delegation
from torchfuse.errors import ArtifactError, UnsupportedError
from torchfuse.targets.captured import captured, nested_as
from torchfuse.targets.executorch.program import ExecutorchModel
from torchfuse.targets.executorch.xnnpack import lower
from torchfuse.targets.target import Made, Request

__all__ = ["made"]

_FP16_MIN_SHARE = 0.98  # of the multiply-accumulates, below which it would be slower than fp32


def made(request: Request) -> Made:
    """Return the model as a program that was loaded here.

    Raises:
        InputError: the model is in another precision than was asked for.
        UnsupportedError: it cannot be captured or lowered, or does not run here.
    """
    found = captured(request, suffix=".pte", lacking="XNNPACK has no kernels")
    lowered = lower(found.program)
    if found.precision == "fp16":
        _require_delegated(lowered.delegation)
    try:
        loaded = ExecutorchModel(lowered.program, lowered.signature)
    except ArtifactError as error:
        raise UnsupportedError(
            f"ExecuTorch does not run the {found.precision} program here: {error}."
        ) from error
    return Made(
        files={".pte": lowered.program},
        precision=found.precision,
        metadata={
            "signature": dict(lowered.signature),
            "executorch": version("executorch"),
            "operators": lowered.operators,
            "backends": lowered.backends,
        },
        run=nested_as(loaded, found.program.call_spec.out_spec),
        reference=found.reference,
        delegation=lowered.delegation,
        other_cases=found.other_cases,
        known=found.known,
    )


def _require_delegated(delegation: Delegation) -> None:
    # Converting the arguments and results is never delegated; what counts is where the work is.
    share = delegation.macs_share
    if not delegation.calls_delegated or (share is not None and share < _FP16_MIN_SHARE):
        raise UnsupportedError(f"XNNPACK does not run this model in fp16: {delegation.warning}")
