"""What tests of the rewriting rules share: a program of a few layers, merged, and compared."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export

import torchfuse
from torchfuse.planning import FusionResult

__all__ = ["Model", "calls", "fused", "reasons", "rules"]

Body = Callable[["Model", Tensor], object]


class Model(nn.Module):
    """Modules by name, used as `body` says."""

    def __init__(self, body: Body, **modules: nn.Module):
        super().__init__()
        self.body = body
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> object:
        return self.body(self, x)


def fused(
    body: Body, x: Tensor, rule: str | None = None, /, dynamic: object = None, **modules: nn.Module
) -> FusionResult:
    """Return the fused program of `body`, having compared it in float32 and in float64.

    Norms get statistics that are not trivial. With `rule`, only that one is used. In float64 the
    conditions alone must make it right: the proof is there to find their defects.
    """
    torch.manual_seed(0)
    model = Model(body, **modules).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
    wide = export(model.double(), (x.double(),), dynamic_shapes=dynamic)
    names = None if rule is None else [rule]
    exact = torchfuse.fuse_exported(wide, rules=names, verify=False)
    compare(wide, exact.model, x.double(), 1e-12)
    program = export(model.float(), (x,), dynamic_shapes=dynamic)
    before = {name: value.clone() for name, value in program.state_dict.items()}
    result = torchfuse.fuse_exported(program, rules=names)
    compare(program, result.model, x, 1e-4)
    assert calls(exact) == calls(result)
    assert before.keys() == program.state_dict.keys()
    assert all(torch.equal(value, program.state_dict[name]) for name, value in before.items())
    used = set(result.model.state_dict)
    assert {went for went in result.key_map.values() if went is not None} <= used
    assert result.key_map.keys() == before.keys()
    return result


def compare(before: ExportedProgram, after: ExportedProgram, x: Tensor, within: float) -> None:
    for case in (x, torch.randn_like(x)):
        expected, got = before.module()(case.clone()), after.module()(case.clone())
        for a, b in zip(leaves(expected), leaves(got), strict=True):
            assert a.shape == b.shape
            assert a.dtype is b.dtype
            assert (a - b).abs().max() <= within * (1 + a.abs().max())


def leaves(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    assert isinstance(value, (list, tuple))
    return [leaf for entry in value for leaf in leaves(entry)]


def calls(result: FusionResult) -> dict[str, int]:
    """How many calls of each operator are left: {"conv2d": 1}."""
    return dict(
        Counter(
            node.target.overloadpacket.__name__
            for node in result.model.graph.nodes
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
        )
    )


def rules(result: FusionResult) -> list[str]:
    """The names of the rules that did something."""
    return [fusion.rule for fusion in result.plan.fusions]


def reasons(result: FusionResult) -> str:
    """Why something was skipped, a line each."""
    return "\n".join(f"{skip.rule}: {skip.reason}" for skip in result.plan.skips)
