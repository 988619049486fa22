"""What `torchfuse.quantize` costs beside plain prepare → calibrate → convert → lower.

MobileNetV2, 100 samples, one process per sample and thread, alternating. "recovery" and "explain"
are shown as costs of their own. Memory is the process's peak, which the graph before it shares.

    python benchmarks/quantizing_cost.py [--rounds 3] [--json quantizing_cost.json]
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from torchfuse.stats import percentile, ratio_of_medians

SAMPLES = 100
TARGET_RATIO = 1.1
VARIANTS = ("plain", "torchfuse", "torchfuse, recovery", "torchfuse, explain")


def sample(variant: str) -> dict[str, Any]:
    """Quantize and lower once in this process."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    from torchfuse.models.batch_norms import settle_batch_norms
    from torchfuse.models.mobilenet_v2 import INPUT_SHAPE, MobileNetV2
    from torchfuse.quantizing.recovery import STEPS

    model = settle_batch_norms(MobileNetV2(), torch.randn(4, 3, 96, 96))
    data = [torch.randn(INPUT_SHAPE) for _ in range(SAMPLES)]
    start = time.perf_counter()
    size = (
        plainly(model, data)
        if variant == "plain"
        else ours(
            model,
            data,
            recovery=STEPS if variant.endswith("recovery") else (),
            explain=variant.endswith("explain"),
        )
    )
    wall_s = time.perf_counter() - start
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"wall_s": wall_s, "peak_bytes": peak_bytes, "size_bytes": size}


def plainly(model: Any, data: list[Any]) -> int:
    """Fold with torch.export's own means, quantize and lower by the libraries' documented calls."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    graph = torch.export.export(model, (data[0],)).module()
    config = get_symmetric_quantization_config(is_per_channel=True)
    prepared = prepare_pt2e(graph, XNNPACKQuantizer().set_global(config))
    with torch.no_grad():
        for x in data:
            prepared(x)
    program = torch.export.export(convert_pt2e(prepared), (data[0],))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    return len(edge.to_executorch().buffer)


def ours(model: Any, data: list[Any], **options: Any) -> int:
    """Quantize with torchfuse and lower, as `torchfuse quantize` does."""
    from torchfuse.cases import Case
    from torchfuse.lowering.capture import capture
    from torchfuse.quantizing import quantize
    from torchfuse.targets.executorch.xnnpack import lower

    result = quantize(model, data[0], data, **options)
    return len(lower(capture(result.model, Case((data[0],)))).program)


def main() -> None:
    """Alternate the variants, print a table and a sentence, and write the samples as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sample", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sample:
        print(json.dumps(sample(options.sample)))
        return
    samples: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for number in range(options.rounds):
        for variant in random.sample(VARIANTS, len(VARIANTS)):
            print(f"round {number + 1} of {options.rounds}: {variant}", file=sys.stderr)
            child = subprocess.run(
                [sys.executable, __file__, "--sample", variant],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                check=True,
            )
            samples[variant].append(json.loads(child.stdout.splitlines()[-1]))
    times = {name: [taken["wall_s"] for taken in samples[name]] for name in VARIANTS}
    print(f"{'MobileNetV2, 100 samples':<24} {'median':>8} {'min … max':>17} {'peak':>9}")
    for name in VARIANTS:
        peak = percentile([taken["peak_bytes"] for taken in samples[name]], 50)
        spread = f"{min(times[name]):.1f} … {max(times[name]):.1f} s"
        print(
            f"{name:<24} {percentile(times[name], 50):>6.1f} s {spread:>17} {peak / 1e6:>6.0f} MB"
        )
    ratio = ratio_of_medians(times["torchfuse"], times["plain"], round_runs=1)
    met = ratio.value <= TARGET_RATIO
    print(
        f"Without recovery and explain, torchfuse takes {ratio.value:.2f} times as long; the "
        f"target is at most {TARGET_RATIO}: {'met' if met else 'NOT met'}."
    )
    if options.json:
        result = {"samples": samples, "ratio": ratio.value, "target_ratio": TARGET_RATIO}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
