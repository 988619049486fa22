"""What a suite costs and buys: builds in parallel, times as if alone, the engine's own share.

    python benchmarks/suites.py [--models 10] [--runs 30] [--repeats 3] [--json suites.json]

Small convolutional nets, each as eager mode and `.pte` in fp32 and int8. Their files are made by
one worker and by two; their times in a suite, while the other worker makes the next files, are put
beside those of a `torchfuse compare` that has the machine for itself, before and after. The
engine's share is the time between the end of a worker's job and the beginning of its next. What a
thousand models would take is calculated from these. Ends with status 1 where two workers are not
1.5 times as fast, the engine takes more than 50 ms a job, or times differ more often than two
comparisons' do.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

TARGET_SPEED_UP = 1.5
TARGET_OVERHEAD_S = 0.05
MODELS, WORKERS = 1000, 100  # on paper
NO_OPS = 1000
CHANNELS = 3


def network(depth: int, width: int) -> tuple[nn.Module, torch.Tensor]:
    """Return a small net of convolutions, and an input: what the suite's models are."""
    torch.manual_seed(depth * width)
    layers: list[nn.Module] = []
    channels = CHANNELS
    for _ in range(depth):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return nn.Sequential(*layers).eval(), torch.randn(1, CHANNELS, 32, 32)


def suite_text(models: int, runs: int) -> str:
    """Return a suite of so many nets, each another one."""
    tables = [
        f'[models.net{number}]\nsource = "{Path(__file__).resolve()}:network'
        f'({2 + number % 5}, {16 + 8 * (number // 5)})"\n'
        for number in range(models)
    ]
    head = f'targets = ["eager", "pte"]\nvariants = ["fused", "int8"]\nruns = {runs}\n'
    return "\n".join([head, *tables, '[data.noise]\npath = "random"\n'])


def warm_up() -> None:
    """Load in a worker what each must have loaded once: it is no part of a build."""
    import torchfuse

    model, x = network(1, 4)
    with tempfile.TemporaryDirectory() as folder:
        torchfuse.export(model, x, Path(folder) / "x.pte", precision="int8", calibration=[x])


def nothing(number: int) -> int:
    """Do nothing, as a job."""
    return number


def run_suite(
    entries: Sequence[Any], workers: int, folder: Path, *, only_builds: bool = False
) -> tuple[Any, Any]:
    """Return a suite that was run, with its outcomes, and its result."""
    from torchfuse.suites.cluster import cluster
    from torchfuse.suites.running import Suite

    chosen = [replace(entry, devices=()) for entry in entries] if only_builds else entries
    with cluster(None, workers) as client:
        client.run(warm_up)
        suite = Suite(chosen, client, store=str(folder / "cache"), is_ours=True, anew=True)
        return suite, suite.run()


def span_s(suite: Any) -> float:
    """Return the time from the first job's beginning to the last one's end."""
    outcomes = [outcome for _, outcome in suite.outcomes]
    return float(max(o.ended_s for o in outcomes) - min(o.began_s for o in outcomes))


def gaps_s(suite: Any) -> list[float]:
    """Return what lies between one job and the next, of a suite with one worker."""
    spans = sorted((o.began_s, o.ended_s) for _, o in suite.outcomes)
    return [after[0] - before[1] for before, after in itertools.pairwise(spans)]


def times_alone(entries: Sequence[Any], runs: int, folder: Path) -> list[Any]:
    """Return each model's comparison by a command of its own."""
    from torchfuse.comparing.comparison import Comparison

    found = []
    for entry in entries:
        words = ["--targets", "eager,pte", "--variants", "fused,int8", "--data", "random", "-q"]
        target = folder / f"{entry.name}.json"
        subprocess.run(
            [
                *(sys.executable, "-m", "torchfuse", "compare", entry.source, *words),
                *("--runs", str(runs), "--json", str(target), "--markdown", str(folder / "x.md")),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found.append(Comparison.from_json(target.read_text()))
    return found


def differing(some: Sequence[Any], others: Sequence[Any]) -> tuple[int, int, float]:
    """Return how many rows have times that surely differ, of how many, and the median ratio."""
    from torchfuse.stats import ratio_of_medians

    ratios = []
    for one, other in zip(some, others, strict=True):
        for row in one.rows:
            before = other.find(row.variant, row.target, row.precision)
            ratios.append(ratio_of_medians(row.latency.samples_s, before.latency.samples_s))
    surely = sum(ratio.measurable for ratio in ratios)
    return surely, len(ratios), statistics.median(ratio.value for ratio in ratios)


def scheduler_s() -> float:
    """Return what the scheduler and client take for a job that does nothing."""
    from torchfuse.suites.cluster import cluster

    with cluster(None, 2) as client:
        began_s = time.perf_counter()
        client.gather(client.map(nothing, range(NO_OPS), pure=False))
        return (time.perf_counter() - began_s) / NO_OPS


def main() -> int:
    """Measure, print and save; return the status."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3, help="of the builds on one and on two")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    from torchfuse.suites.suite_file import read_suite

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "suite.toml").write_text(suite_text(asked.models, asked.runs))
        entries = read_suite(folder / "suite.toml")
        # By turns: what else the machine's host does comes and goes.
        ones, twos = [], []
        for _ in range(asked.repeats):
            ones.append(run_suite(entries, 1, folder, only_builds=True)[0])
            twos.append(run_suite(entries, 2, folder, only_builds=True)[0])
        before = times_alone(entries, asked.runs, folder)
        whole, result = run_suite(entries, 2, folder)
        after = times_alone(entries, asked.runs, folder)
        no_op_s = scheduler_s()
    comparisons = [each.comparison for each in result.results]
    spans = [(span_s(one), span_s(two)) for one, two in zip(ones, twos, strict=True)]
    ratios = sorted(one_s / two_s for one_s, two_s in spans)
    speed_up = statistics.median(ratios)
    build_s, built_s = map(statistics.median, zip(*spans, strict=True))
    gap_s = statistics.median(gap for one in ones for gap in gaps_s(one))
    in_suite, rows, ratio = differing(comparisons, before)
    alone, _, ratio_alone = differing(after, before)
    timings = [o for job, o in whole.outcomes if job.device is not None]
    time_s = statistics.median(o.ended_s - o.began_s - o.waited_s for o in timings)
    make_s = statistics.median(
        o.ended_s - o.began_s - o.waited_s for one in ones for _, o in one.outcomes
    )
    result_bytes = len(result.to_json().encode()) / asked.models
    # On paper: each worker is a machine of its own, and does its share of both kinds of jobs.
    share_s = MODELS / WORKERS * (make_s + time_s + 2 * gap_s)
    figures = {
        "models": asked.models,
        "builds, one worker (s)": build_s,
        "builds, two workers (s)": built_s,
        "speed-up": speed_up,
        "speed-ups": ratios,
        "engine per job (s)": gap_s,
        "a job that does nothing (s)": no_op_s,
        "rows": rows,
        "rows that differ, in the suite": in_suite,
        "rows that differ, alone again": alone,
        "median ratio, in the suite": ratio,
        "median ratio, alone again": ratio_alone,
        "making a model's files (s)": make_s,
        "timing them (s)": time_s,
        "result per model (bytes)": result_bytes,
        "on paper (s)": share_s,
        "on paper, jobs a second": 2 * MODELS / share_s,
        "on paper, jobs a second that the scheduler can": 1 / no_op_s,
    }
    lines = {
        f"builds of {asked.models} models": (
            f"one worker {build_s:.1f} s, two {built_s:.1f} s: {speed_up:.2f} times as fast "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}, {len(ratios)} tries; target {TARGET_SPEED_UP})"
        ),
        "engine per job": (
            f"{1e3 * gap_s:.1f} ms (target {1e3 * TARGET_OVERHEAD_S:.0f}); a job that does "
            f"nothing {1e3 * no_op_s:.1f} ms"
        ),
        "times in the suite": (
            f"{in_suite} of {rows} rows surely differ from those alone (median ratio {ratio:.3f}); "
            f"alone once more, {alone} do ({ratio_alone:.3f})"
        ),
        "a model": (
            f"files {make_s:.1f} s, times {time_s:.1f} s, result {result_bytes / 1e3:.0f} kB"
        ),
        f"{MODELS} on {WORKERS}, on paper": (
            f"{share_s / 60:.1f} min, {2 * MODELS / share_s:.0f} jobs a second where the "
            f"scheduler does {1 / no_op_s:.0f}; result {MODELS * result_bytes / 1e6:.0f} MB"
        ),
    }
    for name, text in lines.items():
        print(f"{name:22} {text}")
    if asked.json is not None:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n")
    missed = speed_up < TARGET_SPEED_UP or gap_s > TARGET_OVERHEAD_S or in_suite > alone + 1
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
