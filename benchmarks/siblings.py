"""Whether layers of one input are faster as one that is split: q, k and v, gate and up, heads.

Each block is written both ways, with the same weights, and both are exported by torchfuse. One
thread, interleaved; the ratio of the medians, merged / separate, with its interval.

    python benchmarks/siblings.py [--only NAME] [--json siblings.json] [--runs 60] [--clock cpu]
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import torchfuse
from torchfuse.measuring.timing import measure_interleaved, ratio

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SUFFIXES = (".pte", ".onnx", ".xml")
RIGHT = 1e-4  # of the largest output


class Siblings(nn.Module):
    """Layers of one input, apart or as one that is split along `axis`."""

    def __init__(self, layers: Sequence[nn.Linear | nn.Conv2d], axis: int) -> None:
        super().__init__()
        self.layers, self.axis = nn.ModuleList(layers), axis
        self.widths: list[int] | None = None  # of the parts, once they are one layer

    def merge(self) -> None:
        """Make one layer of them."""
        states = [layer.state_dict() for layer in self.layers]
        weight, bias = (torch.cat([state[key] for state in states]) for key in ("weight", "bias"))
        self.widths = [len(state["bias"]) for state in states]
        is_linear = isinstance(self.layers[0], nn.Linear)
        one = nn.Linear(*weight.T.shape) if is_linear else nn.Conv2d(weight.shape[1], len(bias), 1)
        one.load_state_dict({"weight": weight, "bias": bias})
        self.layers = nn.ModuleList([one])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what each layer gives."""
        made = tuple(layer(x) for layer in self.layers)
        return made if self.widths is None else made[0].split(self.widths, self.axis)


class Attention(nn.Module):
    """Multi-head attention."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        layers = [nn.Linear(channels, channels) for _ in range(3)]
        self.siblings = Siblings(layers, -1)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the heads' values, mixed."""
        n, tokens, channels = x.shape
        q, k, v = (
            y.reshape(n, tokens, self.heads, channels // self.heads).transpose(1, 2)
            for y in self.siblings(x)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        result: Tensor = self.out(mixed.reshape(n, tokens, channels))
        return result


class GateAndUp(nn.Module):
    """The feed-forward block of LLaMA-like transformers."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        layers = [nn.Linear(channels, hidden) for _ in range(2)]
        self.siblings = Siblings(layers, -1)
        self.down = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return down(silu(gate) · up)."""
        gate, up = self.siblings(x)
        result: Tensor = self.down(F.silu(gate) * up)
        return result


class Heads(nn.Module):
    """A detector's 1×1 heads on one map: boxes and classes."""

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.before = nn.Conv2d(channels, channels, 3, padding=1)
        layers = [nn.Conv2d(channels, width, 1) for width in widths]
        self.siblings = Siblings(layers, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return boxes, and probabilities of classes."""
        boxes, classes = self.siblings(F.relu(self.before(x)))
        return boxes, classes.sigmoid()


class Projections(nn.Module):
    """A CSP block's two 1×1 convolutions of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        layers = [nn.Conv2d(channels, half, 1) for _ in range(2)]
        self.siblings = Siblings(layers, 1)
        self.inner = nn.Conv2d(half, half, 3, padding=1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return both, the first one convolved, side by side."""
        a, b = (F.silu(y) for y in self.siblings(x))
        result: Tensor = self.out(torch.cat([a + F.silu(self.inner(a)), b], 1))
        return result


# name: what makes the block, and the shape of its input
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ViT-Tiny, q k v": (lambda: Attention(192, 3), (1, 197, 192)),
    "BERT-Tiny, q k v": (lambda: Attention(128, 2), (1, 32, 128)),
    "BERT-Base, q k v": (lambda: Attention(768, 12), (1, 128, 768)),
    "one token, q k v": (lambda: Attention(512, 8), (1, 1, 512)),
    "gate and up": (lambda: GateAndUp(256, 688), (1, 64, 256)),
    "gate and up, one token": (lambda: GateAndUp(512, 1376), (1, 1, 512)),
    "1×1 heads, 64 + 80": (lambda: Heads(64, (64, 80)), (1, 64, 40, 40)),
    "1×1 heads, 4 + 2": (lambda: Heads(64, (4, 2)), (1, 64, 40, 40)),
    "CSP block": (lambda: Projections(64), (1, 64, 40, 40)),
}


@dataclass(frozen=True)
class Row:
    """One block on one runtime."""

    model: str
    suffix: str
    separate_ms: float
    merged_ms: float
    ratio: float  # merged / separate
    low: float | None
    high: float | None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" ({self.low:.2f} … {self.high:.2f})"
        if self.low is None or self.high is None or self.low <= 1 <= self.high:
            verdict = ""
        else:
            verdict = "faster" if self.high < 1 else "slower"
        return (
            f"{self.model:24} {self.suffix:6} {self.separate_ms:8.3f} → {self.merged_ms:7.3f} ms  "
            f"{self.ratio:.2f}{interval}  {verdict}"
        ).rstrip()


def measured(name: str, suffix: str, runs: int, clock: Callable[[], float]) -> Row:
    """Return what merging does to one block on one runtime; the outputs are compared, too."""
    make, shape = MODELS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = make().eval()
    (siblings,) = (m for m in model.modules() if isinstance(m, Siblings))
    loaded, outputs = {}, {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key in ("separate", "merged"):
            if key == "merged":
                siblings.merge()
            path = Path(folder) / f"{key}{suffix}"
            torchfuse.export(model, x, path)
            loaded[key] = torchfuse.load(path)
            leaves = tree_leaves(loaded[key](x))
            outputs[key] = torch.cat([y.flatten() for y in leaves])
        off = (outputs["merged"] - outputs["separate"]).abs().max()
        off /= outputs["separate"].abs().max()
        if off > RIGHT:
            raise SystemExit(f"{name}, {suffix}: the two are {off:.2g} apart")
        times = measure_interleaved(loaded, x, runs=runs, threads=1, clock=clock)
    found = ratio(times["merged"], times["separate"])
    separate, merged = (times[key].median_s * 1e3 for key in ("separate", "merged"))
    return Row(name, suffix, separate, merged, found.value, found.low, found.high)


def main() -> None:
    """Print a line for each block and runtime, and write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=MODELS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in given.only or MODELS:
        for suffix in SUFFIXES:
            row = measured(name, suffix, given.runs, CLOCKS[given.clock])
            print(row, flush=True)
            rows.append(asdict(row))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
