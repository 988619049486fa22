"""Import torchvision beside a torch without CUDA: `from … import torchvision`.

Its only wheels for this torch are built for CUDA. Without CUDA their compiled part cannot be
loaded, and then the import fails where it describes operators of that part. With these operators
defined before it, it succeeds, and what its detectors call runs in Python.
"""

import sys

import torch
from torch import Tensor


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return which boxes, [n, 4], overlap no better one by more than the threshold, best first."""
    left, top, right, bottom = boxes.unbind(1)
    areas = (right - left) * (bottom - top)
    kept = []
    candidates = scores.argsort(descending=True, stable=True)
    while len(candidates):
        best, candidates = candidates[0], candidates[1:]
        kept.append(best)
        width = right[candidates].minimum(right[best]) - left[candidates].maximum(left[best])
        height = bottom[candidates].minimum(bottom[best]) - top[candidates].maximum(top[best])
        overlap = width.clamp(min=0) * height.clamp(min=0)
        union = areas[candidates] + areas[best] - overlap
        candidates = candidates[overlap <= iou_threshold * union]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.int64)


try:
    import torchvision
except RuntimeError as error:
    if "operator torchvision::nms does not exist" not in str(error):
        raise
    for _name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[_name]  # half imported
    _library = torch.library.Library("torchvision", "FRAGMENT")  # lives as long as this module
    for _operator in ("nms", "qnms"):
        _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.impl("nms", _nms, "CPU")
    import torchvision

    # They ask whether the compiled part was loaded; nms, all that they need of it, is there.
    torchvision.ops.boxes._assert_has_ops = lambda: None

__all__ = ["torchvision"]
