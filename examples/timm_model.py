"""A model of timm: its BatchNormAct2d is folded too, and the activation inside stays.

python examples/timm_model.py [NAME]        (pip install timm)
"""

import sys

import timm
import torch

import torchfuse


def main(name: str) -> None:
    """Print what of the model is fused."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()  # pretrained=True: with weights
    size = model.pretrained_cfg["input_size"]
    result = torchfuse.fuse(model, torch.rand(1, *size))
    print(f"{name}: {len(result.plan.fusions)} fused, {len(result.plan.skips)} not fused")
    for skip in result.plan.skips[:3]:
        print(f"{' + '.join(skip.modules)}: {skip.reason}")


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "test_resnet")
