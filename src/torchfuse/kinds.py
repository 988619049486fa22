"""One table from torch functions to the kinds of call that rules know."""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = [
    "DATA_READS",
    "METADATA",
    "MOVES",
    "SHAPE_ONLY",
    "SHAPE_READS",
    "kind_of",
    "name_of",
    "roles",
]

_ALIASES = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), "conv"),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "conv_transpose"),
    **dict.fromkeys(("__add__", "__radd__", "__iadd__"), "add"),
    **dict.fromkeys(("__sub__", "__rsub__", "__isub__"), "sub"),
    **dict.fromkeys(("__mul__", "__rmul__", "__imul__", "multiply"), "mul"),
    **dict.fromkeys(("__truediv__", "__rtruediv__", "__itruediv__", "divide"), "div"),
    **dict.fromkeys(("__matmul__", "__rmatmul__", "bmm", "mm"), "matmul"),
    **dict.fromkeys(("concat", "concatenate"), "cat"),
    **dict.fromkeys(("__getitem__",), "getitem"),
    **dict.fromkeys(("dropout1d", "dropout2d", "dropout3d", "feature_dropout"), "dropout"),
    **dict.fromkeys(("alpha_dropout", "feature_alpha_dropout"), "dropout"),
}

# Sizes and other facts about a tensor that are not its values.
SHAPE_READS = frozenset(
    {"shape", "size", "numel", "nelement", "__len__", "stride", "is_contiguous", "storage_offset"}
)
# Functions that take only the sizes or the dtype of their second tensor.
SHAPE_ONLY = frozenset({"view_as", "reshape_as", "expand_as", "type_as"})
METADATA = SHAPE_READS | frozenset(
    {
        "dim",
        "ndim",
        "ndimension",
        "dtype",
        "device",
        "layout",
        "names",
        "requires_grad",
        "requires_grad_",
        "is_leaf",
        "grad_fn",
        "retains_grad",
        "is_cuda",
        "is_cpu",
        "is_mps",
        "is_meta",
        "is_sparse",
        "is_quantized",
        "is_xpu",
        "is_mkldnn",
        "is_sparse_csr",
        "is_ipu",
        "is_xla",
        "is_vulkan",
        "is_maia",
        "is_nested",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "is_signed",
        "is_inference",
        "is_pinned",
        "is_shared",
        "is_same_size",
        "is_conj",
        "is_neg",
        "is_tensor",
        "is_storage",
        "stride",
        "storage_offset",
        "element_size",
        "itemsize",
        "nbytes",
        "get_device",
        "result_type",
        "can_cast",
        "promote_types",
        "broadcast_shapes",
        "output_nr",
        "_version",
        "__hash__",
        "__repr__",
        "__format__",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "randint_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_empty_strided",
        "has_names",
        "_backward_hooks",
        "_is_view",
        "is_set_to",
        "sym_sizes",
        "dim_order",
        "_python_dispatch",
    }
)

# Python gets to know values, and may branch on them.
DATA_READS = frozenset(
    {
        "item",
        "tolist",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__complex__",
        "numpy",
        "__array__",
        "equal",
        "allclose",
        "is_nonzero",
        "__contains__",
    }
)

# Calls that only move elements (or do nothing); whether the channel axis stays is checked apart.
MOVES = frozenset(
    {
        "identity",
        "dropout",
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "permute",
        "transpose",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "contiguous",
        "clone",
        "detach",
        "alias",
        "T",
        "mT",
        "H",
        "view_as",
        "reshape_as",
        "expand",
        "expand_as",
        "getitem",
        "select",
        "narrow",
        "t",
        "positive",
        "to",
        "type_as",
    }
)

_ROLES = {
    "conv": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose": (
        *("input", "weight", "bias", "stride", "padding"),
        *("output_padding", "groups", "dilation"),
    ),
    "linear": ("input", "weight", "bias"),
    "batch_norm": (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("training", "momentum", "eps"),
    ),
    "dropout": ("input", "p", "training", "inplace"),
    "relu": ("input", "inplace"),
}
# torch.batch_norm and torch.dropout order their arguments in another way than torch.nn.functional.
_ATEN_ROLES = {
    "batch_norm": (
        *("input", "weight", "bias", "running_mean", "running_var"),
        *("training", "momentum", "eps", "cudnn_enabled"),
    ),
    "dropout": ("input", "p", "training"),
}


@cache
def name_of(function: Any) -> str:
    """The function's name; for a property its own name ("shape") instead of "__get__"."""
    name = getattr(function, "__name__", type(function).__name__)
    if name in ("__get__", "__set__", "__delete__"):
        owner = getattr(function, "__self__", None)
        name = getattr(owner, "__name__", name) + ("" if name == "__get__" else "=")
    return str(name)


@cache
def kind_of(function: Any) -> str:
    """The kind of call: `conv` for `torch.conv2d`, `relu` for `Tensor.relu_`."""
    name = name_of(function)
    if name in _ALIASES:
        return _ALIASES[name]
    if name.endswith("_") and not name.startswith("_"):
        name = name.rstrip("_")
    return _ALIASES.get(name, name)


@cache
def roles(function: Any) -> tuple[str, ...]:
    """Names of the positional arguments, for the kinds that rules look into; else empty."""
    kind = kind_of(function)
    functional = getattr(function, "__module__", None) == "torch.nn.functional"
    if kind in _ATEN_ROLES and not functional:
        return _ATEN_ROLES[kind]
    return _ROLES.get(kind, ())
