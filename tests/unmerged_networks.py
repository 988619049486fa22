"""Random networks whose layers are un-merged: split into branches, chains, affines and no-ops.

Each step is known to be undone exactly by one layer, so the engine must bring it back to one. With
small integers as weights and inputs, and powers of four as scales, every sum is exact in float64:
there the merged network must agree bit for bit.
"""

from __future__ import annotations

import linecache
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchfuse
from torchfuse import FusionPlan

if TYPE_CHECKING:
    from random import Random

__all__ = ["Unmerged", "judged", "unmerged"]

CHANNELS = (4, 8)


@dataclass
class Unmerged:
    """A random network, its input, and how many layers it is made of."""

    model: nn.Module
    inputs: Tensor  # float64
    source: str
    layers: int  # convolutions that a perfect merge leaves
    others: int  # calls that are no layers: activations, pools


class _Net(nn.Module):
    """Layers by name; its forward is written out."""


class _Writing:
    def __init__(self, random: Random, seed: int) -> None:
        self.random = random
        self.generator = torch.Generator().manual_seed(seed)
        self.model = _Net()
        self.lines: list[str] = []
        self.count = 0

    def integers(self, *shape: int, high: int = 3) -> Tensor:
        values = torch.randint(-high, high + 1, shape, generator=self.generator).double()
        return values if values.any() else values + 1

    def powers(self, *shape: int) -> Tensor:
        """Powers of four, and of two where no root is taken of them."""
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

    def conv(self, into: int, out: int, kernel: int, stride: int, groups: int, bias: bool) -> str:
        conv = nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=bias).double()
        with torch.no_grad():
            conv.weight.copy_(self.integers(*conv.weight.shape))
            if conv.bias is not None:
                conv.bias.copy_(self.integers(out))
        return self.module("conv", conv)

    def norm(self, channels: int) -> str:
        """A batch norm whose var + eps are powers of four."""
        norm = nn.BatchNorm2d(channels, eps=0.25).double()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            norm.running_mean.copy_(self.integers(channels))
            norm.running_var.copy_(self.powers(channels) - 0.25)
            norm.weight.copy_(self.powers(channels))
            norm.bias.copy_(self.integers(channels))
        return self.module("bn", norm)

    def after(self, x: str, channels: int) -> str:
        """Write up to two affines and no-ops after `x`."""
        for _ in range(self.random.randrange(3)):
            x = self.line(self.affine(x, channels))
        return x

    def affine(self, x: str, channels: int) -> str:
        trained = self.random.random() < 0.5
        scale = self.constant(self.powers(channels, 1, 1), trained=trained)
        shift = self.constant(self.integers(channels, 1, 1), trained=trained)
        written = (
            f"{self.norm(channels)}({x})", f"{x} * {scale}", f"{x} + {shift}", f"{shift} - {x}",
            f"{x} / {self.random.choice((2, 4, 0.5))}", f"-{x}", f"F.dropout({x}, 0.1, False)",
            f"{x} + 0",
        )  # fmt: skip
        return self.random.choice(written)

    def layer(self, x: str, into: int, out: int, kernel: int, stride: int, groups: int) -> str:
        bias = self.random.random() < 0.5
        return self.after(
            self.line(f"{self.conv(into, out, kernel, stride, groups, bias)}({x})"), out
        )

    def branched(self, x: str, into: int, out: int, kernel: int, stride: int, groups: int) -> str:
        """Write one layer as a sum of branches of `x`."""
        branches = [self.layer(x, into, out, kernel, stride, groups)]
        kinds = ["smaller", "same", "pointwise"]
        if stride == 1 and into == out:
            kinds += ["identity", "norm", "scaled"]
        for _ in range(self.random.randrange(1, 4)):
            kind = self.random.choice(kinds)
            if kind in ("smaller", "pointwise"):
                size = self.random.choice([k for k in (1, 3, 5) if k <= kernel])
                branches.append(self.layer(x, into, out, size, stride, groups))
            elif kind == "same":
                branches.append(self.layer(x, into, out, kernel, stride, groups))
            elif kind == "identity":
                branches.append(x)
            elif kind == "norm":
                branches.append(self.line(f"{self.norm(into)}({x})"))
            else:
                branches.append(
                    self.line(f"{x} * {self.constant(self.powers(into, 1, 1), trained=True)}")
                )
        self.random.shuffle(branches)
        form = self.random.choice(("+", "sum", "stack", "add_"))
        if form == "sum":
            return self.line(f"sum([{', '.join(branches)}])")
        if form == "stack":
            return self.line(f"torch.stack([{', '.join(branches)}]).sum(0)")
        if form == "add_" and branches[0] != x:
            total = self.line(f"{branches[0]} + 0")
            self.lines += [f"{total}.add_({branch})" for branch in branches[1:]]
            return total
        signs = [self.random.choice("+-") for _ in branches[1:]]
        rest = " ".join(f"{sign} {b}" for sign, b in zip(signs, branches[1:], strict=True))
        return self.line(f"{branches[0]} {rest}")


def unmerged(random: Random, seed: int) -> Unmerged:
    """Draw a network; equal seeds draw equal ones."""
    writing = _Writing(random, seed)
    channels = random.choice(CHANNELS)
    inputs = writing.integers(2, channels, 7, 6)
    x, layers, others = "input", 0, 0
    for _ in range(random.randrange(1, 4)):
        out = random.choice(CHANNELS)
        groups = random.choice([1, 1, 2, 4])
        kernel, stride = random.choice([(1, 1), (3, 1), (3, 2), (5, 1)])
        make = random.choice([writing.layer, writing.branched, writing.branched])
        x = writing.after(make(x, channels, out, kernel, stride, groups), out)
        x = writing.line(random.choice(["F.relu({0})", "F.relu6({0})", "{0}.relu_()"]).format(x))
        channels, layers, others = out, layers + 1, others + 1
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
    others = torch.randint(-3, 4, drawn.inputs.shape, generator=generator).double()
    for inputs in (drawn.inputs, others):
        with torch.no_grad():
            expected = drawn.model(inputs.clone())
            got = result.model.module()(inputs.clone())
        if not torch.equal(expected, got):
            found.append(f"differs by {(expected - got).abs().max():.3g}")
    left = Counter(
        str(node.target).split(".")[1] for node in result.model.graph.nodes if node.op[:4] == "call"
    )
    if left["conv2d"] != drawn.layers or left.total() > drawn.layers + drawn.others:
        found.append(f"{dict(left)} left of {drawn.layers} layers: {result.plan}")
    return result.plan, found
