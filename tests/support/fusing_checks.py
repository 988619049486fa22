"""The two verdicts of the specification: *fuses, exactly*, and *skipped, and says why*."""

import copy
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchfuse
from support.as_if_trained import as_if_trained

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


IMAGE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
ROW = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


class ConvBn(nn.Module):
    """Convolution and batch norm, called one after the other; what subclasses vary."""

    def __init__(self, conv: nn.Module | None = None, bn: nn.Module | None = None):
        super().__init__()
        self.conv = conv or nn.Conv2d(4, 4, 3, padding=1)
        self.bn = bn or nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class NormAct(nn.BatchNorm2d):
    """As in timm: torch's forward, copied, then a dropout and an activation."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.5), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        batch_statistics = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            batch_statistics,
            factor,
            self.eps,
        )
        return self.act(self.drop(x))


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return max|a − b| / max|a|."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert torch.equal(a.isfinite(), b.isfinite())
    a, b = a.double(), b.double()
    return ((a - b).abs().max() / a.abs().max().clamp(min=1e-12)).item()


def assert_same(a: object, b: object) -> None:
    """Assert that two outputs (tensors, or nested in tuples, lists, dicts) agree."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        assert relative_difference(a, b) <= TOLERANCE.get(a.dtype, 0)
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (tuple, list)):
        assert isinstance(b, type(a))
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


def trained(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Return `model` in eval mode, with statistics of inputs like these."""
    return as_if_trained(model, lambda m: [m(like(inputs, seed, 4)) for seed in (11, 12)])


def like(inputs: Tensor, seed: int, batch: int | None = None) -> Tensor:
    """Return other random inputs of the same kind."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch or inputs.shape[0], *inputs.shape[1:])
    return torch.randn(shape, generator=generator).to(inputs.dtype)


def check(
    model: nn.Module,
    inputs: Tensor,
    *,
    others: tuple[Tensor, ...] = (),
    methods: tuple[str, ...] = (),
) -> "torchfuse.FusionResult":
    """Fuse `model`, assert that nothing it computes changed, return the result.

    Compared: the given inputs, others like them, other batch sizes, `others`, and `methods`. It
    must hold by the conditions alone too: the proof is there to find their defects, not for them
    to rely on.
    """
    reference = copy.deepcopy(model)
    result = torchfuse.fuse(model, inputs)
    unproved = torchfuse.fuse(model, inputs, verify=False)
    for fused in (result.model, unproved.model):
        _assert_computes_the_same(reference, fused, inputs, others, methods)
    return result


def _assert_computes_the_same(
    reference: nn.Module,
    fused: nn.Module,
    inputs: Tensor,
    others: tuple[Tensor, ...],
    methods: tuple[str, ...],
) -> None:
    cases = [inputs, like(inputs, 1), like(inputs, 2) * 3 - 1, like(inputs, 3, 5), *others]
    with torch.no_grad():
        for case in cases:
            assert_same(reference(case.clone()), fused(case.clone()))
        for method in methods:
            expected = getattr(reference, method)(inputs.clone())
            assert_same(expected, getattr(fused, method)(inputs.clone()))


def assert_fuses(
    model: nn.Module, inputs: Tensor, times: int = 1, **options: object
) -> "torchfuse.FusionResult":
    """Assert that exactly `times` fusions happen and that no output changes."""
    result = check(model, inputs, **options)
    assert len(result.plan.fusions) == times, str(result.plan)
    return result


def assert_fuses_in_both_hosts(
    model: nn.Module, inputs: Tensor, times: int = 1, **options: object
) -> "torchfuse.FusionResult":
    """Assert that a module fuses, and that its program does, to one without a batch norm."""
    result = assert_fuses(model, inputs, times, **options)
    fused = torchfuse.fuse_exported(torch.export.export(model, (inputs.clone(),)))
    targets = [str(node.target) for node in fused.model.graph.nodes]
    assert not [target for target in targets if "batch_norm" in target]
    assert {fusion.rule for fusion in result.plan.fusions} <= {f.rule for f in fused.plan.fusions}
    program = fused.model.module()
    with torch.no_grad():
        for case in (inputs, like(inputs, 1), like(inputs, 2) * 3 - 1):
            assert_same(model(case.clone()), program(case.clone()))
    return result


def assert_skipped(
    model: nn.Module, inputs: Tensor, because: str, times: int = 0, **options: object
) -> "torchfuse.FusionResult":
    """Assert that only `times` fusions happen, and that a skip's reason matches `because`."""
    result = check(model, inputs, **options)
    assert len(result.plan.fusions) == times, str(result.plan)
    reasons = [skip.reason for skip in result.plan.skips]
    assert any(re.search(because, reason) for reason in reasons), reasons
    return result


def check_not_folded(model: nn.Module) -> None:
    """Assert that the batch norm stays and that nothing changed."""
    result = check(trained(model, IMAGE), IMAGE)
    assert result.plan.fusions == (), str(result.plan)
