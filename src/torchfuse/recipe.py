"""PyTorch's "Fuse Modules" recipe, end to end, on today's PyTorch; then on two real models.

Define a model, fuse it, quantize it, script it, optimize it for mobile, save it, and compare the
fused with the non-fused one.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from torchfuse.comparing.comparison import Comparison
from torchfuse.comparing.variants import compare
from torchfuse.fusing.by_name import fuse_modules
from torchfuse.measuring import speed_benchmark
from torchfuse.measuring.timing import pinned_threads
from torchfuse.models import annotated, digits, mobilenet_v2
from torchfuse.models.batch_norms import settle_batch_norms

__all__ = ["example_model", "run"]

# The list that the recipe fuses, and the one that it should have fused: the conv has most to gain.
RECIPE_LIST = [["bn", "relu"]]
WHOLE_LIST = [["conv", "bn", "relu"]]

Say = Callable[[str], None]


def run(folder: Path, *, say: Say, progress: Say, runs: int = 30) -> list[Comparison]:
    """Return the comparisons of the example model, of a digits net and of MobileNetV2.

    Artifacts are left in `folder`, one folder a model. `say` is given what the recipe prints,
    `progress` a description before each long step.
    """
    return [
        example_model(folder / "example", say=say, progress=progress, runs=runs),
        digits_net(folder / "digits", say=say, progress=progress, runs=runs),
        mobilenet(folder / "mobilenet_v2", progress=progress, runs=runs),
    ]


def example_model(folder: Path, *, say: Say, progress: Say, runs: int) -> Comparison:
    """Return the comparison of the recipe's own model, printed before and after fusing."""
    with _seeded():
        model = annotated.AnnotatedConvBnReLUModel()
        calibration = torch.rand(8, *annotated.INPUT_SHAPE[1:])
        settle_batch_norms(model, calibration)
    say(f"The example model:\n{model}")
    as_in_recipe = fuse_modules(model, RECIPE_LIST)
    say(f"After fuse_modules(model, {RECIPE_LIST}), as in the recipe:\n{as_in_recipe}")
    inputs = calibration[:1]
    fused = fuse_modules(model, WHOLE_LIST, example_inputs=inputs)
    say(f"After fuse_modules(model, {WHOLE_LIST}), the conv included:\n{fused}")
    comparison = compare(
        model,
        inputs,
        fused={"bn-relu fused": as_in_recipe, "fused": fused},
        calibration=calibration,
        folder=folder,
        runs=runs,
        progress=partial(_prefixed, progress, "example"),
    )
    for name in ("int8_not_fused.pt", "int8_bn-relu_fused.pt", "int8_fused.pt"):
        progress(f"example: speed_benchmark_torch on {name}")
        say(_speed_benchmark(folder / name))
    return comparison


def _speed_benchmark(path: Path) -> str:
    """Return the recipe's benchmark command for `path` and what it prints."""
    dims = ",".join(map(str, annotated.INPUT_SHAPE))
    output = io.StringIO()
    options = speed_benchmark.Options(model=str(path), input_dims=dims, input_type="float")
    with pinned_threads(1):
        speed_benchmark.run(options, output)
    command = f"speed_benchmark_torch --model={path} --input_dims={dims} --input_type=float"
    return f"$ {command}\n{output.getvalue().rstrip()}"


def digits_net(folder: Path, *, say: Say, progress: Say, runs: int) -> Comparison:
    """Return the comparison of a net trained here on scikit-learn's digits, with accuracies."""
    data = digits.load()
    progress("digits: training")
    net = digits.train(
        data, on_epoch=lambda done: progress(f"digits: training, epoch {done} of {digits.EPOCHS}")
    )
    say(
        f"The digits net was trained on {len(data.train_labels)} images; accuracies are on the "
        f"{len(data.test_labels)} held out."
    )
    inputs = data.test_images[:1]
    return compare(
        net,
        inputs,
        fused={"fused": fuse_modules(net, digits.MODULES_TO_FUSE, example_inputs=inputs)},
        calibration=data.train_images[:200],
        evaluate=partial(digits.accuracy, digits=data),
        folder=folder,
        runs=runs,
        progress=partial(_prefixed, progress, "digits"),
    )


def mobilenet(folder: Path, *, progress: Say, runs: int) -> Comparison:
    """Return the comparison of MobileNetV2 with random weights: latencies, not accuracies."""
    progress("MobileNetV2: settling batch norms")
    with _seeded():
        images = torch.rand(4, *mobilenet_v2.INPUT_SHAPE[1:])
        model = settle_batch_norms(mobilenet_v2.MobileNetV2(), images)
    return compare(
        model,
        images[:1],
        calibration=images,
        folder=folder,
        runs=runs,
        progress=partial(_prefixed, progress, "MobileNetV2"),
    )


def _prefixed(progress: Say, model: str, step: str) -> None:
    progress(f"{model}: {step}")


@contextmanager
def _seeded() -> Iterator[None]:
    """Draw the same numbers in every run, and leave the caller's random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
