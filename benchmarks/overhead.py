"""What torchfuse's measuring loop adds to a call, against a native loop on the same file.

For `.ptl` the native loop is PyTorch's own speed_benchmark_torch, for `.pte` a plain C++ loop on
ExecuTorch's runtime (native/pte_loop.cc); native/building.py says how each is built. Both sides
take turns in random order, each turn in new processes: each warms up and is timed, call by call,
on one thread. A round's median of ours is compared with the same round's of the native loop; the
interval is a bootstrap over rounds. On a model that does next to nothing, the difference is what a
call costs at least: the floor.

All processes keep the memory that they free. By glibc's defaults it depends on what else a process
has allocated whether a model's large intermediate results are mapped anew for each call, and that
alone makes MobileNetV2's `.ptl` up to twice as slow, in either process.

    python benchmarks/overhead.py [--rounds 40] [--runs 100] [--json overhead.json]
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from native.building import Native, NotBuiltError, build_pte_loop, build_speed_benchmark
from torch import nn

import torchfuse
from torchfuse.artifacts import write_atomically
from torchfuse.devices.facts import facts_of
from torchfuse.devices.local import Local
from torchfuse.measuring.cautions import cautions
from torchfuse.models.batch_norms import settle_batch_norms
from torchfuse.models.mobilenet_v2 import INPUT_SHAPE, MobileNetV2
from torchfuse.runner.machine_state import this_state
from torchfuse.stats import Ratio, ratio_of_medians
from torchfuse.units import duration

TARGET_RATIO = 1.02  # at most 2 % more than the native loop, on MobileNetV2
WIDEST_INTERVAL = 0.05  # of a busy machine, it includes or excludes anything
WARMUP = 20
# As torchfuse has it for the files it measures: else page faults come and go.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_MAX_": "0"}
FLOOR_RUNS = 2000  # of a few microseconds each


class Twice(nn.Module):
    """Next to nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return 2 x."""
        return x + x


@dataclass(frozen=True)
class Case:
    """One file that both loops run on ones of this shape."""

    name: str
    path: Path
    shape: tuple[int, ...]
    runs: int
    judged: bool  # whether the target is about it


@dataclass
class Times:
    """What was measured of one case, in seconds, round after round."""

    native_s: list[float] = field(default_factory=list)
    execute_s: list[float] = field(default_factory=list)  # of it, the program alone; .pte only
    ours_s: list[float] = field(default_factory=list)

    def ratio(self, runs: int) -> Ratio:
        """Return ours by native."""
        return ratio_of_medians(self.ours_s, self.native_s, round_runs=runs)


def main() -> None:
    """Build, measure, print the table, and save every sample."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--runs", type=int, default=100, help="timed calls of each in a round")
    parser.add_argument("--build", type=Path, default=Path("out/native"), help="for the binaries")
    parser.add_argument("--tool-source", type=Path, help="PyTorch's speed_benchmark_torch.cc")
    parser.add_argument("--json", type=Path, help="save every sample and ratio there")
    options = parser.parse_args()
    if options.json:
        write_atomically(options.json, b"{}\n")  # known to be writable before measuring
    torch.set_num_threads(1)
    natives = dict(built(options.build.resolve(), options.tool_source))
    with tempfile.TemporaryDirectory() as folder:
        cases = [c for c in made(Path(folder), options.runs) if c.path.suffix in natives]
        measured = {case.name: Times() for case in cases}
        before = this_state()
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            for case in cases:
                one_round(case, natives[case.path.suffix], measured[case.name])
    for caution in cautions(before, this_state(), {}, threads=1):
        print(f"Warning: {caution}.", file=sys.stderr)
    print(table(cases, measured))
    for native in natives.values():
        print(f"\n{native.path.name}: {native.command}")
    if options.json:
        write_atomically(options.json, report(cases, measured, natives).encode())


def built(folder: Path, tool_source: Path | None) -> Iterator[tuple[str, Native]]:
    """Yield the native loop for each suffix; say which cannot be built here, and what to do."""
    folder.mkdir(parents=True, exist_ok=True)
    builds = {
        ".pte": lambda: build_pte_loop(folder),
        ".ptl": lambda: build_speed_benchmark(folder, tool_source),
    }
    for suffix, build in builds.items():
        try:
            yield suffix, build()
        except NotBuiltError as error:
            print(f"Left out: {suffix}: {error}", file=sys.stderr)


def made(folder: Path, runs: int) -> Iterator[Case]:
    """Yield every case, its file written."""
    torch.manual_seed(0)
    data = [torch.randn(INPUT_SHAPE) for _ in range(4)]
    mobilenet = settle_batch_norms(MobileNetV2(), torch.cat(data)).eval()
    models = {
        "MobileNetV2": (mobilenet, data[0], runs),
        "x + x": (Twice().eval(), torch.ones(1), FLOOR_RUNS),
    }
    for name, precision, suffix in (
        ("MobileNetV2", "fp32", ".ptl"),
        ("MobileNetV2", "fp32", ".pte"),
        ("MobileNetV2", "int8", ".pte"),
        ("x + x", "fp32", ".ptl"),
        ("x + x", "fp32", ".pte"),
    ):
        model, example, case_runs = models[name]
        path = folder / f"{len(list(folder.iterdir()))}{suffix}"
        calibration = data if precision == "int8" else None
        torchfuse.export(model, example, path, precision=precision, calibration=calibration)
        judged = name == "MobileNetV2"
        yield Case(f"{name} {precision} {suffix}", path, tuple(example.shape), case_runs, judged)


def one_round(case: Case, native: Native, times: Times) -> None:
    """Time both sides once, in random order."""
    sides = [
        lambda: native_turn(case, native, times),
        lambda: times.ours_s.extend(our_times(case)),
    ]
    for side in random.sample(sides, len(sides)):
        side()


def our_times(case: Case) -> tuple[float, ...]:
    """Return the time of each call as `torchfuse.measure` takes it."""
    x = torch.ones(case.shape)
    return torchfuse.measure(case.path, x, warmup=WARMUP, runs=case.runs).samples_s


def native_turn(case: Case, native: Native, times: Times) -> None:
    """Add the time of each call as the native loop takes it."""
    if case.path.suffix == ".pte":
        arguments = [str(case.path), "1", str(WARMUP), str(case.runs)]
        for line in output(native, arguments).splitlines():
            call_ns, execute_ns = map(int, line.split())
            times.native_s.append(call_ns * 1e-9)
            times.execute_s.append(execute_ns * 1e-9)
        return
    text = output(
        native,
        [
            f"--model={case.path}",
            f"--input_dims={','.join(map(str, case.shape))}",
            "--input_type=float",
            f"--warmup={WARMUP}",
            f"--iter={case.runs}",
            "--report_pep=true",
        ],
    )
    if case.judged:
        values = re.findall(r'"value": "([0-9.e+]+)"', text)
        times.native_s += [float(value) * 1e-6 for value in values]
    else:
        # It cuts a call's time to whole microseconds: of calls this short only the mean is of use.
        mean = re.search(r"Microseconds per iter: ([0-9.e+-]+)\. ", text)
        assert mean is not None, text
        times.native_s += [float(mean[1]) * 1e-6] * case.runs


def output(native: Native, arguments: list[str]) -> str:
    """Return what the native loop prints, on one thread."""
    return subprocess.run(
        [native.path, *arguments],
        env={**os.environ, **KEEP_MEMORY, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the runtime's notes on the processor
        text=True,
        check=True,
    ).stdout


def table(cases: list[Case], measured: dict[str, Times]) -> str:
    """Return a line per case, and one on the target or on the floor."""
    width = max(len(case.name) for case in cases)
    lines = [
        f"1 thread, {facts_of(Local()).soc}, medians of round medians",
        "",
        f"{'':{width}}  {'native':>9} {'torchfuse':>9}  ratio (95% interval)",
    ]
    verdicts = []
    for case in cases:
        times = measured[case.name]
        native_s, ours_s = median(case, times.native_s), median(case, times.ours_s)
        found = times.ratio(case.runs)
        interval = "" if found.low is None else f" ({found.low:.4f} … {found.high:.4f})"
        lines.append(
            f"{case.name:{width}}  {duration(native_s):>9} {duration(ours_s):>9}  "
            f"{found.value:.4f}{interval}"
        )
        if case.judged:
            alone = ""
            if times.execute_s:
                more = ratio_of_medians(times.ours_s, times.execute_s, round_runs=case.runs)
                alone = f" (against running the program alone: {more.value - 1:+.2%})"
            verdicts.append(
                f"{case.name}: {found.value - 1:+.2%}, the target is at most "
                f"{TARGET_RATIO - 1:.0%}: {verdict(found)}{alone}."
            )
        else:
            verdicts.append(f"{case.name}: the floor is {duration(ours_s - native_s)} a call.")
    return "\n".join([*lines, "", *verdicts])


def median(case: Case, samples_s: list[float]) -> float:
    """Return the median over rounds of the median time of a call."""
    rounds = [samples_s[i : i + case.runs] for i in range(0, len(samples_s), case.runs)]
    return statistics.median(map(statistics.median, rounds))


def verdict(found: Ratio) -> str:
    """Return whether the target is met, as far as the interval can say."""
    if found.low is None or found.high is None:
        return "too few rounds to say"
    if found.high - found.low > WIDEST_INTERVAL:
        return "the times spread too far to say"
    if found.high <= TARGET_RATIO:
        return "met"
    return "missed" if found.low > TARGET_RATIO else "not decided, the interval includes it"


def report(cases: list[Case], measured: dict[str, Times], natives: dict[str, Native]) -> str:
    """Return everything as JSON."""
    results: list[dict[str, Any]] = []
    for case in cases:
        times = measured[case.name]
        results.append(
            {
                "name": case.name,
                "judged": case.judged,
                "runs_a_round": case.runs,
                "native_median_s": median(case, times.native_s),
                "ours_median_s": median(case, times.ours_s),
                "ours_by_native": asdict(times.ratio(case.runs)),
                **asdict(times),
            }
        )
    return json.dumps(
        {
            "target_ratio": TARGET_RATIO,
            "versions": {name: version(name) for name in ("torch", "executorch", "torchfuse")},
            "machine": asdict(facts_of(Local())),
            "built": {suffix: native.command for suffix, native in natives.items()},
            "results": results,
        },
        indent=2,
    )


if __name__ == "__main__":
    main()
