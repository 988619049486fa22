"""What a model must be before it can be quantized or exported."""

from torch import fx, nn

from torchfuse.errors import InputError
from torchfuse.inputs import Case

__all__ = ["require_eval_mode", "require_forward"]


def require_eval_mode(model: nn.Module) -> None:
    """Raise InputError if `model` is no module, or a part of it is in training mode.

    Exported graphs have no modes.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"Expected a model, a torch.nn.Module, got {type(model).__name__}; a function becomes "
            "one as the `forward` of a class, and a result of fuse or quantize holds one as .model."
        )
    if isinstance(model, fx.GraphModule):
        return
    training = [
        name or "the model itself"
        for name, module in model.named_modules()
        if module.training and not isinstance(module, nn.Identity)  # put in place of another, often
    ]
    if training:
        raise InputError(
            f"Expected a model in eval mode, but {training[0]}"
            f"{f' and {len(training) - 1} more modules are' if training[1:] else ' is'} in "
            "training mode; call model.eval() first."
        )


def require_forward(given: list[Case]) -> None:
    """Raise InputError if a case calls another method than `forward`, the one that is exported."""
    for case in given:
        if case.method != "forward":
            raise InputError(
                f"Expected inputs of `forward`, the method that a file holds, got {case}; export a "
                f"module whose forward calls `{case.method}`."
            )
