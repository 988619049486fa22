"""One table from torch functions to the kinds of call that rules know."""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = [
    "COUNTABLE",
    "DATA_READS",
    "HARMLESS",
    "METADATA",
    "MOVES",
    "SCOPE",
    "SHAPE_ONLY",
    "kind_of",
    "kind_of_name",
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

# Facts about a tensor that are not its values. Python may branch on them all the same.
METADATA = frozenset(
    {
        "__len__",
        "_backward_hooks",
        "_is_view",
        "device",
        "dim",
        "dim_order",
        "dtype",
        "element_size",
        "get_device",
        "grad_fn",
        "has_names",
        "is_complex",
        "is_conj",
        "is_contiguous",
        "is_cpu",
        "is_cuda",
        "is_floating_point",
        "is_inference",
        "is_ipu",
        "is_leaf",
        "is_maia",
        "is_meta",
        "is_mkldnn",
        "is_mps",
        "is_neg",
        "is_nested",
        "is_pinned",
        "is_quantized",
        "is_same_size",
        "is_set_to",
        "is_shared",
        "is_signed",
        "is_sparse",
        "is_sparse_csr",
        "is_vulkan",
        "is_xla",
        "is_xpu",
        "itemsize",
        "layout",
        "names",
        "nbytes",
        "ndim",
        "ndimension",
        "nelement",
        "numel",
        "requires_grad",
        "retains_grad",
        "shape",
        "size",
        "storage_offset",
        "stride",
        "sym_sizes",
    }
)
# Those that say nothing to Python, only to the tensor that is made.
HARMLESS = frozenset(
    {
        "__hash__",
        "_python_dispatch",
        "_version",
        "broadcast_shapes",
        "can_cast",
        "empty_like",
        "full_like",
        "is_storage",
        "is_tensor",
        "new_empty",
        "new_empty_strided",
        "new_full",
        "new_ones",
        "new_zeros",
        "ones_like",
        "output_nr",
        "promote_types",
        "rand_like",
        "randint_like",
        "randn_like",
        "requires_grad_",
        "result_type",
        "zeros_like",
    }
)
METADATA |= HARMLESS
# Facts that are part of every plan's scope: inputs have the same numbers of dimensions.
SCOPE = frozenset({"dim", "ndim", "ndimension"})
# Functions that take only the sizes or the dtype of their second tensor.
SHAPE_ONLY = frozenset({"view_as", "reshape_as", "expand_as", "type_as"})
# What these give back may be more or fewer tensors for another size, which Python can count.
COUNTABLE = frozenset({"__iter__", "chunk", "split", "tensor_split", "unbind", "unsafe_chunk"})
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
        "slice",
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
    return kind_of_name(name_of(function))


def kind_of_name(name: str) -> str:
    """The kind of call, by the function's name; `operator.truediv` is `Tensor.__truediv__`."""
    if name in _ALIASES:
        return _ALIASES[name]
    if name.endswith("_") and not name.startswith("_"):
        name = name.rstrip("_")
    return _ALIASES.get(name, _ALIASES.get(f"__{name}__", name))


@cache
def roles(function: Any) -> tuple[str, ...]:
    """Names of the positional arguments, for the kinds that rules look into; else empty."""
    kind = kind_of(function)
    functional = getattr(function, "__module__", None) == "torch.nn.functional"
    if kind in _ATEN_ROLES and not functional:
        return _ATEN_ROLES[kind]
    return _ROLES.get(kind, ())
