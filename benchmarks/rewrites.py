"""What each rewrite for XNNPACK buys: a `.pte` with all of them against one with all but that one.

For each rewrite, a model of a block or two that it touches, in fp32 and in int8, where that makes
another program: the calls outside the delegate, the pieces, and the ratio of the times, one thread.
A rewrite whose ratio is not below 1 is there for another reason, which is printed.

    python benchmarks/rewrites.py [--only NAME] [--json rewrites.json] [--runs 60] [--clock cpu]
"""

import argparse
import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchfuse
from torchfuse.cases import Case
from torchfuse.errors import UnsupportedError
from torchfuse.lowering import capture as capturing
from torchfuse.lowering.xnnpack_rewrites import REWRITES, REWRITES_ONCE_QUANTIZED, Rewrite, rewrite
from torchfuse.measuring.timing import measure_interleaved, ratio
from torchfuse.targets.executorch import xnnpack
from torchfuse.targets.executorch.program import ExecutorchModel

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RIGHT = 1e-4  # of the largest output


class Between(nn.Module):
    """Something between two 1×1 convolutions or two linear layers, as it is in a network."""

    def __init__(self, channels: int, between: nn.Module, layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.before, self.after = layer(channels, channels), layer(channels, channels)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        """Return what the last layer makes of it."""
        return self.after(self.between(self.before(x)))


class Does(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Call it."""
        return self.function(x)


class Attention(nn.Module):
    """A ViT's, of 3 heads."""

    def __init__(self, channels: int = 192) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the heads' values, mixed."""
        n, tokens, channels = x.shape
        heads = self.qkv(x).reshape(n, tokens, 3, 3, channels // 3).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads.unbind(0))
        return mixed.transpose(1, 2).reshape(n, tokens, channels)


def conv(inputs: int, outputs: int) -> nn.Module:
    """Return a 1×1 convolution."""
    return nn.Conv2d(inputs, outputs, 1)


def on_images(between: nn.Module, size: int = 28, channels: int = 64) -> tuple[nn.Module, Tensor]:
    """Return it between convolutions, and an image."""
    return Between(channels, between, conv), torch.randn(1, channels, size, size)


def on_tokens(between: nn.Module) -> tuple[nn.Module, Tensor]:
    """Return it between linear layers, and 197 tokens of 192 channels, a ViT-Tiny's."""
    return Between(192, between, nn.Linear), torch.randn(1, 197, 192)


def image_norm() -> nn.Module:
    """Return a layer norm over channels, as ConvNeXt's is written."""
    norm = nn.LayerNorm(64)
    return nn.Sequential(Does(lambda x: x.permute(0, 2, 3, 1)), norm, Does(lambda x: x.permute(0, 3, 1, 2)))  # fmt: skip  # noqa: E501


FP32, INT8, BOTH = ("fp32",), ("int8",), ("fp32", "int8")
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], tuple[str, ...]]] = {
    # rewrite: the model, and in which precisions it makes another program
    "write_attention_without_masking": (lambda: on_tokens(Attention()), BOTH),
    "write_matmul_as_bmm": (lambda: on_tokens(Attention()), BOTH),
    "write_selections_as_slices": (lambda: on_tokens(Attention()), BOTH),
    "keep_dimensions_of_means": (
        lambda: on_images(Does(lambda x: x * x.mean((2, 3)).sigmoid()[..., None, None])),
        BOTH,
    ),
    "write_maxima_as_poolings": (
        lambda: on_images(Does(lambda x: x * x.amax((2, 3), keepdim=True).sigmoid())),
        BOTH,
    ),
    "write_upsampling_as_concatenations": (
        lambda: on_images(nn.Upsample(scale_factor=2.0), size=20),
        BOTH,
    ),
    "split_large_depthwise_kernels": (
        lambda: on_images(nn.Conv2d(96, 96, 7, padding=3, groups=96), channels=96),
        BOTH,
    ),
    "write_out_layer_norms": (lambda: on_images(image_norm()), BOTH),
    "write_out_layer_norms, of tokens": (lambda: on_tokens(nn.LayerNorm(192)), BOTH),
    "write_out_group_norms": (lambda: on_images(nn.GroupNorm(8, 64)), BOTH),
    "write_softmax_of_rows": (lambda: on_images(nn.Softmax(1)), FP32),
    "write_means_over_channels_as_convolutions": (
        lambda: on_images(Does(lambda x: x * x.mean(1, keepdim=True).sigmoid())),
        FP32,
    ),
    "write_out_hardsigmoids": (
        lambda: on_images(Does(lambda x: x * F.hardsigmoid(x.mean((2, 3), keepdim=True)))),
        BOTH,
    ),
    "leave_padding_in_int8": (
        lambda: (
            nn.Sequential(
                nn.Conv2d(3, 64, 3, 2, 1),
                nn.ReLU(),
                Does(lambda x: F.pad(x, (0, 1, 0, 1))),
                nn.Conv2d(64, 64, 3, 2, groups=64),
                nn.ReLU(),
            ),
            torch.randn(1, 3, 112, 112),
        ),
        INT8,
    ),
}
# Why a rewrite that is not faster is there all the same.
REASONS = {
    "write_out_layer_norms, of tokens": "a ViT is in one piece for it",
    "write_out_hardsigmoids": "no cast of a number is left outside",
    "write_means_over_channels_as_convolutions": "the program is in one piece for it",
}


@dataclass(frozen=True)
class Row:
    """What one rewrite does to one model in one precision."""

    rewrite: str
    precision: str
    left: tuple[int, int]  # calls outside the delegate, without and with it
    pieces: tuple[int, int]
    ratio: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" ({self.low:.2f} … {self.high:.2f})"
        is_faster = self.high is not None and self.high < 1
        reason = "" if is_faster else REASONS.get(self.rewrite, "")
        return (
            f"{self.rewrite:42} {self.precision:5} {self.left[0]:>5} → {self.left[1]:<3} "
            f"{self.pieces[0]:>5} → {self.pieces[1]:<3} {self.ratio:.2f}{interval}  {reason}"
        ).rstrip()


@contextlib.contextmanager
def without(skipped: Rewrite | None) -> Iterator[None]:
    """Leave one rewrite out."""

    def fewer(
        program: torch.export.ExportedProgram, rewrites: Sequence[Rewrite] = REWRITES
    ) -> dict[str, int]:
        return rewrite(program, [each for each in rewrites if each is not skipped])

    with patch.object(capturing, "rewrite", fewer), patch.object(xnnpack, "rewrite", fewer):
        yield


def lowered(
    model: nn.Module, x: Tensor, precision: str, skipped: Rewrite | None
) -> tuple[ExecutorchModel, int, int]:
    """Return the program, and how many calls and pieces it has outside and inside the delegate."""
    with without(skipped), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if precision == "int8":
            model = torchfuse.quantize(model, x, [x, x + 0.1], recovery=()).model
        found = xnnpack.lower(capturing.capture(model, Case((x,))))
    program = ExecutorchModel(found.program, found.signature)
    with torch.no_grad():
        expected, got = model(x), program(x)
    off = float((expected - got).abs().max() / expected.abs().max())
    if precision == "fp32" and off > RIGHT:
        raise UnsupportedError(f"ExecuTorch computes something else, {off:.2g} off")
    return program, found.delegation.calls_left, found.delegation.partitions


def measured(name: str, precision: str, runs: int, clock: Callable[[], float]) -> Row | str:
    """Return what the rewrite does; or why there is nothing to compare with."""
    rewrites = {each.__name__: each for each in (*REWRITES, *REWRITES_ONCE_QUANTIZED)}
    torch.manual_seed(0)
    model, x = MODELS[name][0]()
    made = {}
    for key, skipped in (("without", rewrites[name.partition(",")[0]]), ("with", None)):
        try:
            made[key] = lowered(model.eval(), x, precision, skipped)
        except UnsupportedError as error:
            return f"{name:42} {precision:5} {key} it: {error}"
    times = measure_interleaved(
        {key: program for key, (program, _, _) in made.items()},
        Case((x,)),
        runs=runs,
        threads=1,
        clock=clock,
    )
    found = ratio(times["with"], times["without"])
    left, pieces = ((made["without"][i], made["with"][i]) for i in (1, 2))
    return Row(name, precision, left, pieces, found.value, found.low, found.high)


def main() -> None:
    """Print a line for each rewrite and precision, and write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=MODELS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'rewrite':42} {'':5} {'calls left':>11} {'pieces':>11} time with it / without")
    for name in given.only or MODELS:
        for precision in MODELS[name][1]:
            row = measured(name, precision, given.runs, CLOCKS[given.clock])
            print(row, flush=True)
            if isinstance(row, Row):
                rows.append(asdict(row))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
