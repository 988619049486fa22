"""Random networks whose layers are un-merged: split into branches, chains, affines and no-ops.

Each step is known to be undone exactly by one layer, so the engine must bring it back to one. With
small integers as weights and inputs, and powers of four as scales, every sum is exact in float64:
there the merged network must agree bit for bit.
"""

from __future__ import annotations

import linecache
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Interpreter

import torchfuse
from torchfuse import FusionPlan

if TYPE_CHECKING:
    from random import Random

    from torch.export import ExportedProgram

__all__ = ["Unmerged", "judged", "unmerged"]

CHANNELS = (4, 8)
SIZES = {1: (9,), 2: (7, 6), 3: (4, 5, 4)}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_LAYERS = (
    *(f"conv{dims}d" for dims in CONVS),
    *(f"conv_transpose{dims}d" for dims in CONVS),
    "linear",
)


@dataclass
class Unmerged:
    """A random network, its input, and how many layers it is made of."""

    model: nn.Module
    inputs: Tensor  # float64
    source: str
    layers: int  # convolutions and linear layers that a perfect merge leaves
    others: int  # calls that are no layers: activations, concatenations, a flatten


@dataclass(frozen=True)
class _Shape:
    """Of one layer."""

    into: int
    out: int
    kernel: int
    stride: int
    groups: int
    padding: int


class _Net(nn.Module):
    """Layers by name; its forward is written out."""


class _Writing:
    def __init__(self, random: Random, seed: int) -> None:
        self.random = random
        self.generator = torch.Generator().manual_seed(seed)
        self.model = _Net()
        self.lines: list[str] = []
        self.count = 0
        self.dims = random.choice([1, 2, 2, 2, 3])
        self.smallest = 0  # of the sizes of what the next layer is given

    def integers(self, *shape: int, high: int = 2) -> Tensor:
        values = torch.randint(-high, high + 1, shape, generator=self.generator).double()
        return values if values.any() else values + 1

    def powers(self, *shape: int) -> Tensor:
        """Powers of four."""
        return 4.0 ** torch.randint(-1, 2, shape, generator=self.generator).double()

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def line(self, expression: str) -> str:
        name = self.name("v")
        self.lines.append(f"{name} = {expression}")
        return name

    def module(self, stem: str, module: nn.Module) -> str:
        name = self.name(stem)
        setattr(self.model, name, module)
        return f"self.{name}"

    def constant(self, value: Tensor, *, trained: bool) -> str:
        name = self.name("c")
        if trained:
            setattr(self.model, name, nn.Parameter(value))
        else:
            self.model.register_buffer(name, value)
        return f"self.{name}"

    # One layer, and what it may be written as

    def conv(self, x: str, shape: _Shape, *, bias: bool | None = None) -> str:
        """Write one convolution of `x`, or a padding and one that does not pad."""
        padding = shape.padding
        if padding and self.random.random() < 0.2:
            x = self.line(f"F.pad({x}, {[padding] * 2 * self.dims})")
            padding = 0
        return self.weighted(
            x,
            CONVS[self.dims](
                *(shape.into, shape.out, shape.kernel, shape.stride, padding),
                groups=shape.groups,
                bias=self.random.random() < 0.5 if bias is None else bias,
            ),
        )

    def weighted(self, x: str, layer: Any) -> str:
        """Write the call of a layer with small integers as weights."""
        layer = layer.double()
        with torch.no_grad():
            layer.weight.copy_(self.integers(*layer.weight.shape))
            if layer.bias is not None:
                layer.bias.copy_(self.integers(*layer.bias.shape))
        return self.line(f"{self.module('layer', layer)}({x})")

    def norm(self, channels: int, dims: int) -> str:
        """A batch norm whose var + eps are powers of four."""
        norm = NORMS[dims](channels, eps=0.25).double()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            norm.running_mean.copy_(self.integers(channels))
            norm.running_var.copy_(self.powers(channels) - 0.25)
            norm.running_var.clamp_(min=0.75)  # 4^0, 4^1: `0` would be no variance
            norm.weight.copy_(self.powers(channels))
            norm.bias.copy_(self.integers(channels))
        return self.module("bn", norm)

    def around(self, x: str, channels: int, dims: int | None = None) -> str:
        """Write up to two affines and no-ops of `x`."""
        for _ in range(self.random.randrange(3)):
            x = self.line(self.affine(x, channels, self.dims if dims is None else dims))
        return x

    def affine(self, x: str, channels: int, dims: int) -> str:
        trained = self.random.random() < 0.5
        sizes = (channels, *[1] * dims)
        scale = self.constant(self.powers(*sizes), trained=trained)
        shift = self.constant(self.integers(*sizes), trained=trained)
        turned = [*range(dims + 1, -1, -1)]
        written = (
            f"{self.norm(channels, dims)}({x})", f"{x} * {scale}", f"{x} + {shift}",
            f"{shift} - {x}", f"{x} / {self.random.choice((2, 4, 0.5))}", f"-{x}",
            f"F.dropout({x}, 0.1, False)", f"{x} + 0", f"{x}.to(torch.float64)",
            f"{x}.permute({turned}).permute({turned})", f"{x}.reshape({x}.shape)",
            f"{x}.clone().mul_({scale}).add_({shift})", f"{x}.flatten(1).reshape({x}.shape)",
            f"torch.multiply({x}, torch.tensor(4.0))", f"{x}.unsqueeze(1).squeeze(1)",
            f"torch.add({x}, {shift}, alpha=2)", f"torch.sub({shift}, {x}, alpha=0.5)",
        )  # fmt: skip
        return self.random.choice(written)

    def layer(self, x: str, shape: _Shape) -> str:
        x = self.conv(x, shape)
        if self.random.random() < 0.2:  # layer scale of channels that were moved to the end
            scale = self.constant(self.powers(shape.out), trained=True)
            x = self.line(f"({x}.movedim(1, -1) * {scale}).movedim(-1, 1)")
        return self.around(x, shape.out)

    def chained(self, x: str, shape: _Shape) -> str:
        """Write one layer as two in a row, which take more multiply-adds."""
        into, out, groups = shape.into, shape.out, shape.groups
        if self.random.random() < 0.5:
            # Zeros that the second one pads with are what the first one makes of zeros.
            first = _Shape(into, 2 * into, 1, 1, groups, 0)
            x = self.conv(x, first, bias=None if not shape.padding else False)
            second = _Shape(2 * into, out, shape.kernel, shape.stride, groups, shape.padding)
            return self.around(self.conv(x, second), out)
        first = _Shape(into, 2 * out, shape.kernel, shape.stride, groups, shape.padding)
        x = self.around(self.conv(x, first), 2 * out)
        return self.around(self.conv(x, _Shape(2 * out, out, 1, 1, groups, 0)), out)

    def branched(self, x: str, shape: _Shape) -> str:
        """Write one layer as a sum of branches of `x`."""
        into, out, kernel, stride = shape.into, shape.out, shape.kernel, shape.stride
        branches = [self.random.choice([self.layer, self.layer, self.chained])(x, shape)]
        kinds = ["smaller", "same"]
        if stride == 1 and into == out and shape.padding == kernel // 2:
            kinds += ["identity", "norm", "scaled"]
        if into == out and kernel == 3 and self.dims in (2, 3) and self.smallest >= kernel:
            kinds.append("average")
        if kernel == 3 and shape.padding == 1 and shape.groups <= 2:
            kinds.append("one side")
        for _ in range(self.random.randrange(1, 4)):
            kind = self.random.choice(kinds)
            if kind == "smaller" and shape.padding == kernel // 2:
                size = self.random.choice([k for k in (1, 3, 5) if k <= kernel])
                smaller = _Shape(into, out, size, stride, shape.groups, size // 2)
                branches.append(self.layer(x, smaller))
            elif kind == "one side":
                sides = [self.random.choice(("1, 0", "0, 1")) for _ in range(self.dims)]
                wider = self.line(f"F.pad({x}, [{', '.join(sides)}])")
                branches.append(self.layer(wider, _Shape(into, out, 2, stride, shape.groups, 0)))
            elif kind in ("same", "smaller"):
                branches.append(self.layer(x, shape))
            elif kind == "identity":
                branches.append(x)
            elif kind == "norm":
                branches.append(self.line(f"{self.norm(into, self.dims)}({x})"))
            elif kind == "average":
                sizes = f"{kernel}, {stride}, {shape.padding}, divisor_override=4"
                branches.append(self.line(f"F.avg_pool{self.dims}d({x}, {sizes})"))
            else:
                scale = self.constant(self.powers(into, *[1] * self.dims), trained=True)
                branches.append(self.line(f"{x} * {scale}"))
        self.random.shuffle(branches)
        return self.sum_of(branches, x)

    def sum_of(self, branches: list[str], x: str) -> str:
        form = self.random.choice(("+", "sum", "stack", "mean", "add_", "alpha"))
        if form == "sum":
            return self.line(f"sum([{', '.join(branches)}])")
        if form == "stack":
            return self.line(f"torch.stack([{', '.join(branches)}]).sum(0)")
        if form == "mean" and len(branches) in (2, 4):  # of three, a third is no exact number
            return self.line(f"torch.stack([{', '.join(branches)}]).mean(0)")
        if form == "add_" and branches[0] != x:
            total = self.line(f"{branches[0]} + 0")
            for branch in branches[1:]:
                factor = self.random.choice(("", "", ", alpha=2"))
                self.lines.append(f"{total}.add_({branch}{factor})")
            return total
        if form == "alpha":
            total = branches[0]
            for branch in branches[1:]:
                name, factor = self.random.choice(("add", "sub")), self.random.choice((2, 0.5, -4))
                total = self.line(f"torch.{name}({total}, {branch}, alpha={factor})")
            return total
        signs = [self.random.choice("+-") for _ in branches[1:]]
        rest = " ".join(f"{sign} {b}" for sign, b in zip(signs, branches[1:], strict=True))
        return self.line(f"{branches[0]} {rest}")

    def transposed(self, x: str, shape: _Shape) -> str:
        sizes = (shape.into, shape.out, shape.kernel, shape.stride, shape.padding)
        made = [
            self.around(
                self.weighted(x, TRANSPOSED[self.dims](*sizes, groups=shape.groups)), shape.out
            )
            for _ in range(self.random.choice((1, 2)))
        ]
        return made[0] if len(made) == 1 else self.sum_of(made, x)

    def concatenated(self, x: str, shape: _Shape) -> str:
        """Write two layers side by side, with a norm over both."""
        parts = [self.conv(x, shape), self.conv(x, shape)]
        x = self.line(f"torch.cat([{', '.join(parts)}], 1)")
        return self.line(f"{self.norm(2 * shape.out, self.dims)}({x})")

    def head(self, x: str, channels: int, places: int) -> None:
        """Write the end: linear layers of all that there is."""
        into, out, back = channels * places, 4, ""
        x = self.line(f"{self.around(x, channels)}.flatten(1)")
        if self.random.random() < 0.5:
            x = self.around(self.weighted(x, nn.Linear(into, 2 * out)), 2 * out, 0)
            into = 2 * out
            # Of one layer, a move and the one back are nothing.
            there, back = self.random.choice(
                (
                    *(("", ""), (".unsqueeze(1)", ".squeeze(1)")),
                    *((f".view(1, 2, {into})", f".view(2, {out})"),),
                    *((f".reshape(-1, 1, {into})", ".flatten(1)"), (".t().t()", "")),
                )
            )
            x = self.line(f"{x}{there}")
        x = self.weighted(x, nn.Linear(into, out, self.random.random() < 0.5))
        self.around(self.line(f"{x}{back}"), out, 0)


def unmerged(random: Random, seed: int) -> Unmerged:
    """Draw a network; equal seeds draw equal ones."""
    writing = _Writing(random, seed)
    channels, sizes = random.choice(CHANNELS), list(SIZES[writing.dims])
    inputs = writing.integers(2, channels, *sizes)
    x, layers, others = "input", 0, 0
    for _ in range(random.randrange(1, 4)):
        out = random.choice(CHANNELS)
        writing.smallest = min(sizes)
        groups = random.choice([1, 1, 2, 4])
        kernel, stride = random.choice([(1, 1), (3, 1), (3, 2), (5, 1)])
        pads = random.random() < 0.6 or min(sizes) < kernel
        shape = _Shape(channels, out, kernel, stride, groups, kernel // 2 if pads else 0)
        makes = [writing.layer, writing.branched, writing.branched, writing.chained]
        make = random.choice([*makes, writing.transposed, writing.concatenated])
        if not shape.padding and make not in (writing.transposed, writing.concatenated):
            x = writing.around(x, channels)  # taken in by what follows: nothing pads it
        x = make(x, shape)
        cat = make == writing.concatenated
        out *= 2 if cat else 1
        x = writing.around(x, out)
        x = writing.line(random.choice(["F.relu({0})", "F.relu6({0})", "{0}.relu_()"]).format(x))
        channels, layers, others = out, layers + 1 + cat, others + 1 + cat
        if make == writing.transposed:
            sizes = [(n - 1) * stride - 2 * shape.padding + kernel for n in sizes]
        else:
            sizes = [(n + 2 * shape.padding - kernel) // stride + 1 for n in sizes]
    if random.random() < 0.3:
        places = int(torch.Size(sizes).numel())
        writing.head(x, channels, places)
        x = writing.line(f"F.relu(v{writing.count})")
        layers, others = layers + 1, others + 2
    body = "".join(f"    {line}\n" for line in [*writing.lines, f"return {x}"])
    source = f"def forward(self, input):\n{body}"
    scope = {"F": F, "torch": torch}
    file = f"<unmerged {seed}>"
    exec(compile(source, file, "exec"), scope)
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    _Net_ = type("Net", (_Net,), {"forward": scope["forward"]})
    writing.model.__class__ = _Net_
    return Unmerged(writing.model.eval(), inputs, source, layers, others)


def judged(drawn: Unmerged) -> tuple[FusionPlan, list[str]]:
    """Return what was merged, and what is wrong with it, a line each."""
    program = torch.export.export(drawn.model, (drawn.inputs,))
    result = torchfuse.fuse_exported(program)
    found = []
    generator = torch.Generator().manual_seed(1)
    others = torch.randint(-2, 3, drawn.inputs.shape, generator=generator).double()
    for inputs in (drawn.inputs, others):
        with torch.no_grad():
            expected = drawn.model(inputs.clone())
            got = _output(result.model, inputs.clone())
        if not torch.equal(expected, got):
            found.append(f"differs by {(expected - got).abs().max():.3g}")
    left = Counter(
        str(node.target).split(".")[1] for node in result.model.graph.nodes if node.op[:4] == "call"
    )
    layers = sum(left[name] for name in _LAYERS)
    if layers != drawn.layers or left.total() > drawn.layers + drawn.others:
        found.append(f"{dict(left)} left of {drawn.layers} layers: {result.plan}")
    return result.plan, found


def _output(program: ExportedProgram, inputs: Tensor) -> Tensor:
    """Return what a program gives; making a module of it first would take ten times as long."""
    stored = {**program.constants, **program.state_dict}
    arguments = [
        inputs if spec.kind is InputKind.USER_INPUT else stored[spec.target or ""]
        for spec in program.graph_signature.input_specs
    ]
    (output,) = Interpreter(program.graph_module).run(*arguments, enable_io_processing=False)
    assert isinstance(output, Tensor)
    return output
