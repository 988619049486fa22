"""The models of the table, but for the tests' hazards: named, and built when they are needed."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from support.as_if_trained import as_if_trained, keep_scale
from support.networks import network
from support.zoo import FAMILIES, HAND_WRITTEN, Entry
from support.zoo.more_families import MORE_FAMILIES
from verdict_table.of_model import Verdicts, verdicts_of

TIMM_FAMILIES = Path(__file__).with_name("timm_families.tsv")
TORCHVISION_MODELS = Path(__file__).with_name("torchvision_models.tsv")
RANDOM_NETWORKS = 500

# Of torchvision's models, those that take a list of images, and those that take films.
_DETECTORS = ("fasterrcnn", "fcos", "keypointrcnn", "maskrcnn", "retinanet", "ssd300", "ssdlite320")
_FEW_BOXES = {  # most of the time of a detector would go into sorting out thousands
    "rcnn": {
        "rpn_pre_nms_top_n_test": 20,
        "rpn_post_nms_top_n_test": 20,
        "box_detections_per_img": 9,
    },
    "one stage": {"topk_candidates": 20, "detections_per_img": 9},
}
_VIDEO = ("mc3_18", "mvit", "r2plus1d_18", "r3d_18", "s3d", "swin3d")
_FRAMES = 16

Models = dict[str, Callable[[], Verdicts]]  # by name, how to come to the verdicts on one


@dataclass(frozen=True, eq=False)
class Built:
    """A model in evaluation mode, its statistics those of four examples."""

    name: str
    model: nn.Module
    inputs: Callable[[int], tuple[Any, ...]]  # so many examples, of eight


Builders = dict[str, Callable[[], Built]]


def coverage() -> Builders:
    """Return the tests' own models, and those of transformers."""
    entries = (*HAND_WRITTEN, *FAMILIES, *MORE_FAMILIES)
    return {entry.name: partial(_of_entry, entry) for entry in entries}


def _of_entry(entry: Entry) -> Built:
    if entry not in HAND_WRITTEN and find_spec("torchvision"):
        # transformers imports it where it finds it.
        import verdict_table.torchvision_without_cuda  # noqa: F401
    return _built(entry.name, entry.build, lambda batch: (entry.inputs(8)[:batch],))


def timm_families() -> Builders:
    """Return the smallest model with batch norms of each of timm's families."""
    return {name: partial(_of_timm, name, side) for name, side in _listed(TIMM_FAMILIES)}


def _listed(path: Path) -> list[tuple[str, int]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return [(name, int(side)) for name, side in rows]


def _of_timm(name: str, side: int) -> Built:
    import verdict_table.torchvision_without_cuda  # noqa: F401  # or timm could not be imported

    import timm  # isort: skip

    return _built(name, lambda: timm.create_model(name), lambda batch: (_noise(batch, 3, side),))


def torchvision_models() -> Builders:
    """Return the models of torchvision's list; those made to be quantized, as they are before."""
    listed = _listed(TORCHVISION_MODELS)
    return {name: partial(_of_torchvision, name, side) for name, side in listed}


def _of_torchvision(name: str, side: int) -> Built:
    from verdict_table.torchvision_without_cuda import torchvision

    builder = torchvision.models.get_model_builder(name)
    options = {"weights_backbone": None, "quantize": False, "init_weights": False}
    named = inspect.signature(builder).parameters
    options = {key: value for key, value in options.items() if key in named}
    if name.startswith(_DETECTORS):
        options |= _FEW_BOXES["rcnn" if "rcnn" in name else "one stage"]
        if not name.startswith("ssd"):
            options |= {"min_size": side, "max_size": side}  # to which they enlarge an image

    def inputs(batch: int) -> tuple[Any, ...]:
        if name.startswith(_DETECTORS):
            return (list(_noise(batch, 3, side)),)
        if name.startswith("raft"):
            return (_noise(batch, 3, side), _noise(batch + 4, 3, side)[4:])
        if name.startswith(_VIDEO):
            return (_noise(batch, 3, _FRAMES, side),)
        return (_noise(batch, 3, side),)

    # RAFT makes its coordinates in float32, whatever the rest is in.
    dtype = torch.float32 if name.startswith("raft") else torch.float64
    return _built(name, lambda: builder(weights=None, **options), inputs, dtype)


def _noise(batch: int, *shape: int) -> Tensor:
    """Return the first of eight random images or films, [batch, *shape, shape[-1]]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, *shape, shape[-1], generator=generator)[:batch]


def _built(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Callable[[int], tuple[Any, ...]],
    dtype: torch.dtype = torch.float64,
) -> Built:
    """Return a new model, with statistics of four examples.

    They are computed in float64 and without dropout: else they would be others on another
    processor, by as much as a deep model amplifies, and so would be the outputs.
    """
    torch.manual_seed(0)
    model = build().eval()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]

    def run(training: nn.Module) -> None:
        training.eval()  # as it is used: a detector without its losses
        for norm in norms:
            norm.train()
        training(*_in(dtype, inputs(4)))
        training.train()  # which drops what some cache, in this dtype, while they are evaluated

    if norms:
        keep_scale(model)
        model = as_if_trained(model.to(dtype), run).float()
    return Built(name, model, inputs)


def _in(dtype: torch.dtype, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype)
    return type(value)(_in(dtype, entry) for entry in value)


def random_networks() -> Models:
    """Return the first of the random networks; those that compute in bfloat16 without the proof.

    There rounding hides what the proof looks for, and how it rounds depends on the processor: of
    39 such networks, 3 had other verdicts with other instructions.
    """
    return {f"seed {seed}": partial(_of_random, seed) for seed in range(RANDOM_NETWORKS)}


def _of_random(seed: int) -> Verdicts:
    drawn = network(Random(seed), seed)
    return verdicts_of(
        f"seed {seed}",
        drawn.model,
        drawn.inputs(0),
        proved=not drawn.rough,
        in_float64=lambda _: drawn.in_float64().model,
    )


BUILDERS = {"coverage": coverage, "timm": timm_families, "torchvision": torchvision_models}


def _verdicts_on(builders: Callable[[], Builders]) -> Models:
    return {name: partial(_judged, build) for name, build in builders().items()}


def _judged(build: Callable[[], Built]) -> Verdicts:
    """Return the verdicts on a model, fused with one of the examples that its statistics are of.

    With one they had not seen, a deep model would amplify rounding beyond what float32 can prove.
    """
    built = build()
    # No second copy in float64: nobody else has the model.
    return verdicts_of(built.name, built.model, built.inputs(1), in_float64=nn.Module.double)


GROUPS: dict[str, Callable[[], Models]] = {
    **{group: partial(_verdicts_on, builders) for group, builders in BUILDERS.items()},
    "random": random_networks,
}
