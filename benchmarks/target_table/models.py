"""The ten models, with random weights and settled statistics, each with the shape of its input."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchfuse.models.batch_norms import settle_batch_norms

__all__ = ["MODELS", "Entry", "with_example"]

_LEAST_VARIANCE = 0.2  # of a channel, of the layer's median


@dataclass(frozen=True)
class Entry:
    """How to build a model, and what it takes."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 224, 224)  # without the batch

    def model(self) -> nn.Module:
        """Return it in eval mode, as if trained: with other statistics than fresh ones.

        With untouched ones, a wrong fold looks right, and activations vanish or explode, so that
        int8 has nothing to be as good at.
        """
        torch.manual_seed(0)
        model = self.build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gamma"):  # layer scale, 1e-6 at first: a branch that is nothing
                    parameter.uniform_(0.1, 0.5)
        norms = [each for each in model.modules() if isinstance(each, _BatchNorm)]
        if not norms:
            return model.eval()
        settle_batch_norms(model, self.inputs(4, seed=2))
        for norm in norms:
            # A channel that is 0 on these images is multiplied by 300 on others, and RepVGG in int8
            # is noise by it, of whomever.
            variance = norm.running_var
            variance.clamp_(min=_LEAST_VARIANCE * float(variance.median()))
        return model

    def inputs(self, count: int, *, seed: int) -> Tensor:
        """Return `count` random images, [count, *shape]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, *self.shape, generator=generator)


def _of_timm(name: str) -> Entry:
    def build() -> nn.Module:
        # torchvision's wheel is built for CUDA; timm imports it.
        from verdict_table.torchvision_without_cuda import torchvision  # noqa: F401

        import timm  # isort: skip

        model: nn.Module = timm.create_model(name)
        return model

    return Entry(build)


def _mobilenet_v2() -> nn.Module:
    from torchfuse.models.mobilenet_v2 import MobileNetV2

    return MobileNetV2()


def _yolo() -> nn.Module:
    from support.zoo.yolo import YOLO

    return YOLO()


MODELS = {
    "resnet18": _of_timm("resnet18"),
    "mobilenet_v2": Entry(_mobilenet_v2),
    "mobilenetv3_small_100": _of_timm("mobilenetv3_small_100"),
    "mnasnet_100": _of_timm("mnasnet_100"),
    "regnetx_002": _of_timm("regnetx_002"),
    "repvgg_a0": _of_timm("repvgg_a0"),  # timm's are in the form in which they are trained
    "mobileone_s0": _of_timm("mobileone_s0"),
    "convnext_femto": _of_timm("convnext_femto"),
    "vit_tiny_patch16_224": _of_timm("vit_tiny_patch16_224"),
    "yolo": Entry(_yolo, (3, 320, 320)),
}


def with_example(name: str) -> tuple[nn.Module, Tensor]:
    """Return one of them with an input: what benchmarks/models.toml names."""
    entry = MODELS[name]
    return entry.model(), entry.inputs(1, seed=0)
