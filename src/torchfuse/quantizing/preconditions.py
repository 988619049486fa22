"""What a model must be before it can be quantized or exported."""

from torch import fx, nn

from torchfuse.cases import Case
from torchfuse.errors import InputError
from torchfuse.quantizing.modes import has_modes

__all__ = ["has_quantized_modules", "require_converted", "require_eval_mode", "require_forward"]


def require_eval_mode(model: nn.Module) -> None:
    """Raise InputError if `model` is no module, or computes as in training mode.

    Graphs have no mode of their own; the modules that they call have.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"Expected a model, a torch.nn.Module, got {type(model).__name__}; a function becomes "
            "one as the `forward` of a class, and a result of fuse or quantize holds one as .model."
        )
    # What convert and the like put into a model in eval mode comes in training mode: it counts
    # only where that changes what is computed. The model's own flag says what its owner did.
    training = [
        name or "the model itself"
        for name, module in model.named_modules()
        if module.training
        and (has_modes(module) if name else not isinstance(model, fx.GraphModule))
    ]
    if training:
        raise InputError(
            f"Expected a model in eval mode, but {training[0]}"
            f"{f' and {_more(training)} are' if training[1:] else ' is'} in "
            "training mode; call model.eval() first."
        )


def _more(names: list[str]) -> str:
    return "1 more module" if len(names) == 2 else f"{len(names) - 1} more modules"


def require_converted(model: nn.Module) -> None:
    """Raise InputError if `model` was prepared for quantizing, and not converted since."""
    for name, module in model.named_modules():
        # by name: torch.ao and torchao have classes of their own
        if _OBSERVING & {owner.__name__ for owner in type(module).__mro__}:
            raise InputError(
                f"Expected a model in float or in int8, but {name or type(model).__name__} is an "
                f"observer ({type(module).__name__}), which prepare put there; convert the model "
                "once it has seen data (torch.ao.quantization.convert, torchfuse.convert_qat)."
            )


_OBSERVING = {"ObserverBase", "FakeQuantizeBase"}


def require_forward(given: list[Case]) -> None:
    """Raise InputError if a case calls another method than `forward`, the one that is exported."""
    for case in given:
        if case.method != "forward":
            raise InputError(
                f"Expected inputs of `forward`, the method that a file holds, got {case}; export a "
                f"module whose forward calls `{case.method}`."
            )


def has_quantized_modules(model: nn.Module) -> bool:
    """Return whether torch.ao has converted a part of `model` to int8."""
    return any(".quantized." in f"{type(m).__module__}." for m in model.modules())
