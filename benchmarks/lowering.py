"""How long lowering MobileNetV2 int8 to `.pte` takes: ExecuTorch's plain calls, and torchfuse's.

Each sample is a process of its own, as `torchfuse export` is one, and the two alternate. Timed is
the lowering alone, `to_edge_transform_and_lower(…).to_executorch()` of the same exported program,
in CPU time, to which other work on the machine adds little. The bytes must be the same in every
sample. With `--pieces` each piece of the waste is done once more while the others are left out.

    python benchmarks/lowering.py [--rounds 7] [--pieces] [--json lowering.json]
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from torchfuse.stats import percentile, ratio_of_medians
from torchfuse.targets.executorch.fast_lowering import PIECES, without_waste

TARGET_RATIO = 0.3
VARIANTS = {"plain": "ExecuTorch's plain calls", "torchfuse": "without waste"}
BUT_FOR = {f"but for {name}": f"… but for {name}" for name in PIECES}


def sample(variant: str) -> dict[str, Any]:
    """Lower once in this process; return the times and the bytes' SHA-256."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    from torchfuse.cases import Case
    from torchfuse.isolation.warning_filters import known_warnings_ignored
    from torchfuse.lowering.capture import capture
    from torchfuse.models.batch_norms import settle_batch_norms
    from torchfuse.models.mobilenet_v2 import INPUT_SHAPE, MobileNetV2
    from torchfuse.quantizing import quantize

    model = settle_batch_norms(MobileNetV2(), torch.randn(4, 3, 96, 96))
    example = torch.randn(INPUT_SHAPE)
    program = capture(quantize(model, example, example).model, Case((example,)))
    with known_warnings_ignored():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        start, cpu_start = time.perf_counter(), time.process_time()
        piece = variant.removeprefix("but for ")
        with contextlib.nullcontext() if variant == "plain" else without_waste(but_for=piece):
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            data = bytes(edge.to_executorch().buffer)
        wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def main() -> None:
    """Alternate the two, print a table and a sentence, and write the samples as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pieces", action="store_true", help="each of them once more")
    parser.add_argument("--sample", choices=VARIANTS | BUT_FOR, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sample:
        print(json.dumps(sample(options.sample)))
        return

    variants = VARIANTS | (BUT_FOR if options.pieces else {})
    samples: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    for number in range(options.rounds):
        for variant in random.sample(list(variants), len(variants)):
            print(f"round {number + 1} of {options.rounds}: {variant}", file=sys.stderr)
            child = subprocess.run(
                [sys.executable, __file__, "--sample", variant],
                stdout=subprocess.PIPE,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                check=True,
            )
            samples[variant].append(json.loads(child.stdout))
    digests = {taken["sha256"] for variant in samples.values() for taken in variant}
    assert len(digests) == 1, f"different bytes: {digests}"

    times = {name: [taken["wall_s"] for taken in samples[name]] for name in variants}
    cpu = {name: [taken["cpu_s"] for taken in samples[name]] for name in variants}
    ratio = ratio_of_medians(cpu["torchfuse"], cpu["plain"], round_runs=1)
    print(f"{'lowering MobileNetV2 int8':<40} {'CPU':>8} {'min … max':>17} {'elapsed':>8}")
    for name, label in variants.items():
        spread = f"{min(cpu[name]):.2f} … {max(cpu[name]):.2f} s"
        print(
            f"{label:<40} {percentile(cpu[name], 50):>6.2f} s {spread:>17} "
            f"{percentile(times[name], 50):>6.2f} s"
        )
    interval = (
        "too few rounds for an interval"
        if ratio.low is None
        else f"{ratio.low:.2f} … {ratio.high:.2f}, 95 %"
    )
    met = (ratio.high or ratio.value) <= TARGET_RATIO
    print(
        f"Without waste it takes {ratio.value:.2f} times the CPU time ({interval}), with the same "
        f"{samples['plain'][0]['size_bytes']:,} bytes; the target is at most {TARGET_RATIO}: "
        f"{'met' if met else 'NOT met'}."
    )
    if options.json:
        result = {
            "samples": samples,
            "ratio": ratio.value,
            "ratio_interval": [ratio.low, ratio.high],
            "target_ratio": TARGET_RATIO,
            "processor": platform.processor(),
            "python": platform.python_version(),
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
