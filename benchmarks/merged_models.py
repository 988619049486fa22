"""What is merged in networks that were not made to be re-parameterised, and what it buys.

    python benchmarks/merged_models.py [--only vit] [--runs 40] [--json merged_models.json]

Per model: what each rule of `torchfuse.fuse_exported` did and why the rest stayed, how far the
outputs are from the original's in float64, and with `--runs` the latency of the `.pte` before
(batch norms folded, nothing more) and after, interleaved, one thread. Needs timm, and transformers
for BERT. Ends with status 1 if an output differs, or a model became slower by more than the
interval.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from typing import TYPE_CHECKING

import torchfuse
from torchfuse.fusing.programs.program_fusing import fold
from torchfuse.lowering import capture as capturing
from torchfuse.measuring.timing import measure_interleaved, ratio
from torchfuse.models.batch_norms import settle_batch_norms

if TYPE_CHECKING:
    from collections.abc import Callable

WITHIN = 1e-9  # max|a − b| / max|a| in float64


@dataclass(frozen=True)
class Row:
    """One model."""

    model: str
    fusions: dict[str, int]  # by rule
    skips: dict[str, int]  # by reason, names left out
    calls: tuple[int, int]  # in the program, before and after
    max_rel: float  # in float64
    latency_ms: dict[str, float]  # medians of "before" and "after"
    ratio: tuple[float, float | None, float | None] | None  # after / before: value, low, high

    @property
    def good(self) -> bool:
        """Whether nothing changed, and nothing became slower."""
        slower = self.ratio is not None and (self.ratio[1] or 0) > 1
        return self.max_rel <= WITHIN and not slower


def of_timm(name: str, size: int = 224) -> Callable[[], tuple[nn.Module, Tensor]]:
    """Return what makes a model of timm, and an image for it."""

    def make() -> tuple[nn.Module, Tensor]:
        import verdict_table.torchvision_without_cuda  # noqa: F401  # or timm could not be imported

        import timm  # isort: skip

        return timm.create_model(name), torch.randn(2, 3, size, size)

    return make


def bert() -> tuple[nn.Module, Tensor]:
    """Return a small BERT that takes embeddings, so that its input is one of real numbers."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
    )
    model = BertModel(config)

    class OnEmbeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = model

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.bert(inputs_embeds=x).last_hidden_state
            return found

    return OnEmbeddings(), torch.randn(2, 32, 128)


def yolo() -> tuple[nn.Module, Tensor]:
    """Return a bottleneck with a batch norm over a concatenation, as YOLOv5 has it, twice."""

    class Csp(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            half = channels // 2
            self.cv1 = nn.Sequential(nn.Conv2d(channels, half, 1), nn.BatchNorm2d(half), nn.SiLU())
            self.m = nn.Sequential(
                nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half), nn.SiLU()
            )
            self.cv2 = nn.Conv2d(channels, half, 1, bias=False)
            self.cv3 = nn.Conv2d(half, half, 1, bias=False)
            self.bn = nn.BatchNorm2d(channels)
            self.cv4 = nn.Sequential(
                nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.SiLU()
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.cv1(x)
            y = torch.cat((self.cv3(y + self.m(y)), self.cv2(x)), 1)
            return self.cv4(nn.functional.silu(self.bn(y)))

    stem = nn.Sequential(nn.Conv2d(3, 32, 6, 2, 2, bias=False), nn.BatchNorm2d(32), nn.SiLU())
    return nn.Sequential(stem, Csp(32), Csp(32)), torch.randn(2, 3, 96, 96)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "vit_tiny_patch16_224": of_timm("vit_tiny_patch16_224"),
    "convnext_atto": of_timm("convnext_atto"),
    "efficientformer_l1": of_timm("efficientformer_l1"),
    "resnetv2_18": of_timm("resnetv2_18"),
    "mobilenetv3_small_100": of_timm("mobilenetv3_small_100"),
    "densenet121": of_timm("densenet121", 96),
    "csp_bottlenecks": yolo,
    "bert_2_layers": bert,
}


def main() -> None:
    """Run the models, print what was found, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--runs", type=int, default=0, help="timed runs of each .pte")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name, make in MODELS.items():
        if options.only in name:
            rows.append(row := row_of(name, make, options.runs))
            did = ", ".join(f"{times} {rule}" for rule, times in row.fusions.items()) or "nothing"
            print(f"{name}: {row.calls[0]} calls → {row.calls[1]}, {row.max_rel:.1e}; {did}")
            for reason, times in row.skips.items():
                print(f"{times:6d}  {reason}")
            if row.ratio is not None:
                value, low, high = row.ratio
                known = "too few runs to say" if low is None else f"{low:.2f} … {high:.2f}"
                before, after = row.latency_ms["before"], row.latency_ms["after"]
                print(f"{'':8}{before:.2f} → {after:.2f} ms, after / before {value:.3f} ({known})")
            if options.json:
                report = {"torch": torch.__version__, "models": [asdict(row) for row in rows]}
                options.json.write_text(json.dumps(report, indent=2) + "\n")
            sys.stdout.flush()
    sys.exit(not all(row.good for row in rows))


def row_of(name: str, make: Callable[[], tuple[nn.Module, Tensor]], runs: int) -> Row:
    """Return what was merged in one model."""
    torch.manual_seed(0)
    model, batch = make()
    settle_batch_norms(model, batch)
    example = batch[:1]
    program = torch.export.export(model, (example,), strict=False)
    result = torchfuse.fuse_exported(program)
    wide = copy.deepcopy(model).double()
    exact = torchfuse.fuse_exported(
        torch.export.export(wide, (example.double(),), strict=False), verify=False
    ).model
    with torch.no_grad():
        a, b = wide(example.double()), exact.module()(example.double())
    latency, found = latencies(model, example, runs) if runs else ({}, None)
    return Row(
        name,
        dict(Counter(fusion.rule for fusion in result.plan.fusions)),
        dict(Counter(without_names(skip.reason) for skip in result.plan.skips).most_common(6)),
        (calls(program), calls(result.model)),
        ((a - b).abs().max() / a.abs().max()).item(),
        latency,
        found,
    )


def calls(program: torch.export.ExportedProgram) -> int:
    """Return how many calls a program makes."""
    return sum(node.op == "call_function" for node in program.graph.nodes)


def without_names(reason: str) -> str:
    """Return the reason with names and numbers left out, so that equal ones add up."""
    return " ".join(
        "…" if "`" in word or any(c.isdigit() for c in word) else word for word in reason.split()
    )


def latencies(
    model: nn.Module, example: Tensor, runs: int
) -> tuple[dict[str, float], tuple[float, float | None, float | None]]:
    """Return medians in ms, and the ratio of "after" to "before"."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.pte" for name in ("before", "after")}
        with (
            patch.object(capturing, "fuse_all", fold),
            patch.object(capturing.rewriting, "rewrite", as_is),
        ):
            torchfuse.export(model, example, files["before"])
        torchfuse.export(model, example, files["after"])
        taken = measure_interleaved(files, example, runs=runs)
    found = ratio(taken["after"], taken["before"])
    latency = {name: one.median_s * 1e3 for name, one in taken.items()}
    return latency, (found.value, found.low, found.high)


@dataclass(frozen=True)
class _AsIs:
    program: torch.export.ExportedProgram


def as_is(program: torch.export.ExportedProgram, *, prove: bool) -> _AsIs:  # noqa: ARG001
    """Stand for rewriting that does nothing."""
    return _AsIs(program)


if __name__ == "__main__":
    main()
