"""How long planning and fusing take, beside a forward pass and beside torch's own fuser.

    python benchmarks/fusing_time.py --json fusing_time.json

One thread, one process, variants in turn, medians. What a verified `fuse` takes is shown by part,
and in forward passes: (its time - 200 ms) / that of one pass on the same inputs. Ends with status 1
if recording takes more than 2.5 forward passes + 100 ms, a verified `fuse` more than 14 where
float32 agrees or 30 where float64 decides, or fusing ResNet-50 unverified and in place more than
twice the time of torch.fx.experimental.optimization. `--timm` adds models of timm, if it is
installed.
"""

import argparse
import contextlib
import copy
import ctypes
import importlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.fx.experimental import optimization

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
if find_spec("torchvision"):  # timm and transformers import it
    import verdict_table.torchvision_without_cuda  # noqa: F401

import torchfuse
from support.zoo import FAMILIES, Entry
from support.zoo.resnet import Bottleneck, ResNet
from torchfuse.models.mobilenet_v2 import MobileNetV2
from torchfuse.stats import ratio_of_medians

PASSES, FIXED_S = 2.5, 0.1  # what recording may take
FUSE_PASSES, FUSE_PASSES_FLOAT64, FUSE_FIXED_S = 14, 30, 0.2  # what a verified `fuse` may take
TIMES_TORCHS = 2

# The parts of a fusion, each with the functions whose own time it is (less that of those inside).
PARTS = {
    "recording": ("torchfuse.fusing.finding:_recorded",),
    "exploring": ("torchfuse.conditions.subject:explore",),
    "judging": ("torchfuse.fusing.model_fusing:find",),
    "copying": ("torchfuse.fusing.model_fusing:_copy",),
    "writing": (
        "torchfuse.fusing.model_fusing:apply",
        "torchfuse.fusing.module_proving:apply",
        "torchfuse.fusing.module_proving:undo",
    ),
    "proving": (
        "torchfuse.fusing.module_proving:PairProof.reference",
        "torchfuse.fusing.model_fusing:fuse_what_agrees",
    ),
    "pairs in float64": ("torchfuse.fusing.module_proving:_in_float64",),
    "whole in float64": (
        "torchfuse.fusing.proving.whole:_widened",
        "torchfuse.fusing.module_proving:_ModuleTrial.outputs",  # of a model in float32: "proving"
    ),
}

TIMM = {  # the side of the pictures
    "resnet18": 128,
    "resnet50": 96,
    "mobilenetv2_050": 128,
    "mobilenetv3_small_100": 128,
    "regnetx_002": 128,
    "densenet121": 96,
    "efficientnet_b0": 128,
    "inception_v3": 128,
    "inception_resnet_v2": 128,
    "levit_128s": 224,
    "repvgg_a0": 128,
    "ghostnet_100": 128,
    "hrnet_w18_small": 128,
    "dla34": 128,
    "rexnet_100": 128,
}

RESNET_50 = Entry("ResNet-50, 64×64", lambda: ResNet(Bottleneck, (3, 4, 6, 3)), (3, 64, 64))
MODELS = (
    RESNET_50,
    Entry("ResNet-50, 224×224", lambda: ResNet(Bottleneck, (3, 4, 6, 3)), (3, 224, 224)),
    Entry("MobileNetV2, 224×224", MobileNetV2, (3, 224, 224)),
    *FAMILIES,
)


def main() -> None:
    """Time the models, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--timm", action="store_true", help="models of timm too")
    parser.add_argument("--only", default="", help="models whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    entries = (*MODELS, *(_timm_entries() if options.timm else ()))
    verified = []
    for entry in entries:
        if options.only.lower() in entry.name.lower():
            print(entry.name, file=sys.stderr, flush=True)
            verified.append(_verified(entry, options.rounds))
    fusing = _fusing(RESNET_50, options.rounds)

    Console(width=170).print(_table(verified, options.rounds))
    table = Table(title=f"Fusing {RESNET_50.name}, median of {options.rounds}, ms")
    table.add_column("call")
    table.add_column("", justify="right")
    for name, samples_s in fusing.items():
        table.add_row(name, f"{median(samples_s) * 1e3:.1f}")
    Console(width=100).print(table)
    ours, _, theirs, _ = fusing.values()  # unverified, and torch's, both in place
    found = ratio_of_medians(ours, theirs, round_runs=1)
    interval = "" if found.low is None else f"95 % interval {found.low:.2f} … {found.high:.2f}; "
    print(
        f"torchfuse takes {found.value:.2f}× the time of torch's fuser ({interval}the target is at "
        f"most {TIMES_TORCHS})."
    )
    if options.json:
        report = {"torch": torch.__version__, "fusing_verified": verified, "fusing_s": fusing}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(found.value > TIMES_TORCHS or any(map(_too_slow, verified)))


def _timm_entries() -> list[Entry]:
    timm = importlib.import_module("timm")

    def made(name: str) -> Callable[[], nn.Module]:
        return lambda: timm.create_model(name)

    return [Entry(name, made(name), (3, size, size)) for name, size in TIMM.items()]


def _verified(entry: Entry, rounds: int) -> dict[str, Any]:
    """Return what `fuse` takes on one sample, by part, beside a forward pass."""
    model, inputs = entry.model(), entry.inputs(1)
    parts: list[dict[str, float]] = []

    def forward() -> None:
        with torch.no_grad():
            model(inputs)

    def fuse() -> torchfuse.FusionResult:
        with _by_part() as seconds:
            result = torchfuse.fuse(model, inputs)
        parts.append(seconds)
        return result

    # Rounds of long calls are few: their times vary less.
    began = time.perf_counter()
    result = fuse()
    rounds = max(3, min(rounds, int(10 / (time.perf_counter() - began))))
    samples_s = _samples_s({"forward": forward, "fuse": fuse}, rounds)
    seconds = {name: median(taken) for name, taken in samples_s.items()}
    passes = (seconds["fuse"] - FUSE_FIXED_S) / seconds["forward"]
    by_part = {part: median(taken.get(part, 0.0) for taken in parts[2:]) for part in PARTS}
    return {
        "model": entry.name,
        "folded": len(result.plan.fusions),
        "forward_s": seconds["forward"],
        "fuse_s": seconds["fuse"],
        "parts_s": by_part,
        "forward_passes": passes,
        "float64_decides": by_part["whole in float64"] > 0,
    }


@contextlib.contextmanager
def _by_part() -> Iterator[dict[str, float]]:
    """Give the seconds that each part of a fusion takes, itself alone, while the context lasts."""
    seconds: dict[str, float] = defaultdict(float)
    inside: list[float] = []  # of the calls that run, the time of the timed ones in them

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            model = getattr(args[0], "model", None) if function.__name__ == "outputs" else None
            narrow = model is not None and next(model.parameters()).dtype is torch.float32
            began = time.perf_counter()
            inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - began
                seconds["proving" if narrow else part] += taken - inside.pop()
                if inside:
                    inside[-1] += taken

        return call

    with contextlib.ExitStack() as stack:
        for part, names in PARTS.items():
            for name in names:
                module, _, path = name.partition(":")
                *owners, attribute = path.split(".")
                owner: Any = importlib.import_module(module)
                for step in owners:
                    owner = getattr(owner, step)
                if attribute in vars(owner):
                    function = vars(owner)[attribute]
                    stack.callback(setattr, owner, attribute, function)
                    setattr(owner, attribute, timed(part, function))
        yield seconds


def _too_slow(row: dict[str, Any]) -> str:
    """Return what takes longer than it may; empty if nothing does."""
    if row["parts_s"]["recording"] > PASSES * row["forward_s"] + FIXED_S:
        return "recording"
    allowed = FUSE_PASSES_FLOAT64 if row["float64_decides"] else FUSE_PASSES
    return "fuse" if row["forward_passes"] > allowed else ""


def _table(rows: list[dict[str, Any]], rounds: int) -> Table:
    table = Table(title=f"A verified fuse, ms, median of up to {rounds}")
    table.add_column("model")
    for heading in ("folded", "pass", *PARTS, "fuse", "in passes", "allowed", "too slow"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = (row["forward_s"], *row["parts_s"].values(), row["fuse_s"])
        table.add_row(
            row["model"],
            str(row["folded"]),
            *(f"{seconds * 1e3:.0f}" for seconds in times),
            f"{row['forward_passes']:.1f}",
            str(FUSE_PASSES_FLOAT64 if row["float64_decides"] else FUSE_PASSES),
            _too_slow(row),
        )
    return table


def _fusing(entry: Entry, rounds: int) -> dict[str, list[float]]:
    """Return seconds per call: each is given a model of its own, made before the clock starts."""
    model, inputs = entry.model(), entry.inputs(1)
    models: list[nn.Module] = []

    def ours(**more: bool) -> Callable[[], object]:
        def call() -> object:
            return torchfuse.fuse(models.pop(), inputs, inplace=True, **more)

        return call

    variants = {
        "torchfuse.fuse(inplace=True, verify=False, keep_originals=False)": ours(
            verify=False, keep_originals=False
        ),
        "torchfuse.fuse(inplace=True)": ours(),
        "torch.fx.experimental.optimization.fuse(inplace=True)": lambda: optimization.fuse(
            models.pop(), inplace=True
        ),
        "torch.fx.experimental.optimization.fuse": lambda: optimization.fuse(models.pop()),
    }
    return _samples_s(variants, rounds, before=lambda: models.append(copy.deepcopy(model)))


def _samples_s(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Return the seconds of each variant's calls: in turn, after a round that is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, call in variants.items():
            before()
            _give_memory_back()
            began = time.perf_counter()
            result = call()
            samples[name].append(time.perf_counter() - began)
            del result  # not in the time
    return {name: taken[1:] for name, taken in samples.items()}


def _give_memory_back() -> None:
    """Let every call begin as in a process that has just loaded its model.

    What the call before has freed would else be this one's to use, without the page faults of new
    memory, and which call has that luck depends on their order.
    """
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
