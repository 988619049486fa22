"""How long planning and fusing take, beside a forward pass and beside torch's own fuser.

    python benchmarks/fusing_time.py --json fusing_time.json

One thread, one process, variants in turn, medians. Ends with status 1 if `plan` takes more than 2.5
forward passes + 100 ms, or fusing ResNet-50 takes longer than torch.fx.experimental.optimization.
"""

import argparse
import contextlib
import copy
import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.fx.experimental import optimization

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torchfuse
from torchfuse.models.mobilenet_v2 import MobileNetV2
from torchfuse.stats import ratio_of_medians
from zoo import FAMILIES, Entry
from zoo.resnet import Bottleneck, ResNet

PASSES, FIXED_S = 2.5, 0.1  # what `plan` may take

RESNET_50 = Entry("ResNet-50, 64×64", lambda: ResNet(Bottleneck, (3, 4, 6, 3)), (3, 64, 64))
MODELS = (
    RESNET_50,
    Entry("ResNet-50, 224×224", lambda: ResNet(Bottleneck, (3, 4, 6, 3)), (3, 224, 224)),
    Entry("MobileNetV2, 224×224", MobileNetV2, (3, 224, 224)),
    *FAMILIES,
)


def main() -> None:
    """Time the models, print two tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    planning = [_planning(entry, options.rounds) for entry in MODELS]
    fusing = _fusing(RESNET_50, options.rounds)

    table = Table(title=f"Planning, median of {options.rounds}, ms")
    for heading in ("model", "forward pass", "plan", "allowed", ""):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in planning:
        within = "" if row["plan_s"] <= row["allowed_s"] else "too slow"
        figures = (f"{row[key] * 1e3:.1f}" for key in ("forward_s", "plan_s", "allowed_s"))
        table.add_row(str(row["model"]), *figures, within)
    Console(width=100).print(table)
    table = Table(title=f"Fusing {RESNET_50.name}, median of {options.rounds}, ms")
    table.add_column("call")
    table.add_column("", justify="right")
    for name, samples_s in fusing.items():
        table.add_row(name, f"{median(samples_s) * 1e3:.1f}")
    Console(width=100).print(table)
    ours, *_, theirs = fusing.values()
    found = ratio_of_medians(ours, theirs, round_runs=1)
    print(
        f"torchfuse takes {found.value:.2f}× the time of torch's fuser (95 % interval "
        f"{found.low:.2f} … {found.high:.2f}; the target is at most 1)."
    )
    if options.json:
        report = {"torch": torch.__version__, "planning": planning, "fusing_s": fusing}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(found.value > 1 or any(row["plan_s"] > row["allowed_s"] for row in planning))


def _planning(entry: Entry, rounds: int) -> dict[str, str | float]:
    model, inputs = entry.model(), entry.inputs(1)

    def forward() -> None:
        with torch.no_grad():
            model(inputs)

    samples_s = _samples_s(
        {"forward": forward, "plan": lambda: torchfuse.plan(model, inputs)}, rounds
    )
    seconds = {name: median(taken) for name, taken in samples_s.items()}
    allowed = PASSES * seconds["forward"] + FIXED_S
    return {
        "model": entry.name,
        "forward_s": seconds["forward"],
        "plan_s": seconds["plan"],
        "allowed_s": allowed,
    }


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
