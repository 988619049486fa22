"""What rules read in a program's graph: constants, sizes, who reads what, layers and affines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from torchfuse.algebra import Affine, Layer
from torchfuse.fusing.programs.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchfuse.fusing.programs.edited_program import EditedProgram

__all__ = ["AffineCall", "LayerCall", "Reading", "arguments", "each", "same_shape"]

aten = torch.ops.aten

_STORED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
# Tensors of one number, of the size of what they are given
_LIKE = {aten.zeros_like.default: 0.0, aten.ones_like.default: 1.0}
# Tensors made of numbers alone
_MAKERS = (aten.full.default, aten.zeros.default, aten.ones.default, aten.scalar_tensor.default)

_CONVS = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.padding: 3,
}
_TRANSPOSED = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}
_MATMULS = (aten.matmul.default, aten.mm.default, aten.addmm.default)
_ADDS = (aten.add.Tensor, aten.add_.Tensor, aten.add.Scalar, aten.add_.Scalar)
_SUBS = (
    *(aten.sub.Tensor, aten.sub_.Tensor, aten.sub.Scalar, aten.sub_.Scalar),
    *(aten.subtract.Tensor, aten.subtract_.Tensor, aten.subtract.Scalar),
)
_RSUBS = (aten.rsub.Tensor, aten.rsub.Scalar)
_MULS = (
    *(aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar),
    *(aten.multiply.Tensor, aten.multiply_.Tensor, aten.multiply.Scalar),
)
_DIVS = (
    *(aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar),
    *(aten.divide.Tensor, aten.divide_.Tensor, aten.divide.Scalar),
    *(aten.true_divide.Tensor, aten.true_divide_.Tensor, aten.true_divide.Scalar),
)
_NEGS = (aten.neg.default, aten.neg_.default, aten.negative.default)
_ELEMENTWISE = frozenset({*_ADDS, *_SUBS, *_RSUBS, *_MULS, *_DIVS, *_NEGS})


@dataclass(frozen=True, eq=False)
class LayerCall:
    """A call of a layer whose weight and bias are constants."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    layer: Layer  # its weight and bias are those of the dtype they are stored in
    axis: int  # of the channels, in what it is given and in what it gives

    @cached_property
    def exact(self) -> Layer:
        """The layer in float64."""
        bias = self.layer.bias
        return replace(
            self.layer,
            weight=self.layer.weight.double(),
            bias=None if bias is None else bias.double(),
        )


@dataclass(frozen=True, eq=False)
class AffineCall:
    """A call that scales and shifts by constants, per channel or everywhere alike."""

    node: Node
    x: Node
    affine: Affine
    axis: int | None  # of the channels; None: everywhere alike


class Reading:
    """A state of an edited program's graph; make another one after an edit."""

    def __init__(self, program: EditedProgram) -> None:
        self.program = program
        self.memory = Memory(program.graph)
        mutated = {
            str(spec.target)
            for spec in program.old.graph_signature.output_specs
            if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
        }
        self._constants: dict[Node, bool] = {}
        self._computed: dict[Node, Tensor] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                spec = program.specs[node.name]
                self._constants[node] = (
                    spec.kind in _STORED
                    and spec.target not in mutated
                    and program.tensor(node) is not None
                    and not self.memory.is_written(node)
                )

    # Constants

    def is_constant(self, value: Any) -> bool:
        """Whether a node's value is the same in each run: stored, or computed of what is stored."""
        if not isinstance(value, Node):
            return False
        if value not in self._constants:
            self._constants[value] = self._computed_of_constants(value)
        return self._constants[value]

    def _computed_of_constants(self, node: Node) -> bool:
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            return False
        if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
            return False
        if not isinstance(node.meta.get("val"), Tensor) or self.memory.is_written(node):
            return False
        inputs = node.all_input_nodes
        return all(map(self.is_constant, inputs)) if inputs else target in _MAKERS

    def constant(self, node: Node) -> Tensor:
        """Return the value of a constant node."""
        if node.op == "placeholder":
            stored = self.program.tensor(node)
            assert stored is not None
            return stored.detach()
        if node in self._computed:
            return self._computed[node]
        args, kwargs = map_arg((node.args, node.kwargs), self.constant)
        assert callable(node.target)
        with torch.no_grad():
            value = node.target(*args, **kwargs)
        assert isinstance(value, Tensor)
        self._computed[node] = value
        return value

    def stored(self, nodes: Sequence[Node]) -> set[str]:
        """Return the names of the stored tensors that these constants are made of."""
        found: set[str] = set()
        for node in nodes:
            if node.op == "placeholder":
                found |= {str(self.program.specs[node.name].target)}
            else:
                found |= self.stored(node.all_input_nodes)
        return found

    # Who reads

    def only_reader(self, node: Node) -> Node | None:
        """Return the one call that reads this node; None if there are several, or none."""
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0].op == "call_function" else None

    # What calls compute

    def layer(self, node: Any) -> LayerCall | None:
        """Return what `node` computes as a layer; None if it is none, or its weight no constant."""
        if not isinstance(node, Node) or node.op != "call_function":
            return None
        target: Any = node.target
        dims = _CONVS.get(target, _TRANSPOSED.get(target, 0))
        if dims:
            found = self._convolution(node, dims)
        elif node.target is aten.linear.default:
            x, weight, bias = arguments(node)
            found = self._layer_call(node, x, weight, bias, {}, dims)
        elif node.target in _MATMULS:
            found = self._matmul(node)
        else:
            return None
        if found is None or not _one_dtype(node, found.x, found.weight):
            return None
        return found

    def _convolution(self, node: Node, dims: int) -> LayerCall | None:
        transposed = node.target in _TRANSPOSED
        sizes: dict[str, Any] = {}
        if transposed:
            x, weight, bias, stride, padding, output_padding, groups, dilation = arguments(node)
            sizes = {"transposed": True, "output_padding": each(output_padding, dims)}
        else:
            x, weight, bias, stride, padding, dilation, groups = arguments(node)
        dilation = each(dilation, dims)
        if padding == "valid":
            padding = 0
        elif padding == "same":
            kernel = weight.meta["val"].shape[2:]
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            if any(total % 2 for total in totals):
                return None  # it pads one side more
            padding = [total // 2 for total in totals]
        sizes |= {
            "stride": each(stride, dims),
            "padding": each(padding, dims),
            "dilation": dilation,
            "groups": groups,
        }
        return self._layer_call(node, x, weight, bias, sizes, dims)

    def _matmul(self, node: Node) -> LayerCall | None:
        """A product with a constant matrix [in, out] is a linear layer."""
        given = arguments(node)
        bias, factors = None, [1, 1]
        if node.target is aten.addmm.default:
            bias, x, weight, *factors = given
        else:
            x, weight = given
        if not self.is_constant(weight) or not isinstance(x, Node) or factors != [1, 1]:
            return None
        matrix = weight.meta["val"]
        if matrix.dim() != 2 or x.meta["val"].dim() < 2:
            return None
        if bias is not None and bias.meta["val"].shape != matrix.shape[1:]:
            return None
        found = self._layer_call(node, x, weight, bias, {}, 0)
        if found is None:
            return None
        turned = Layer(found.layer.weight.t(), found.layer.bias)
        return LayerCall(node, x, weight, bias, turned, found.axis)

    def _layer_call(
        self, node: Node, x: Any, weight: Any, bias: Any, sizes: dict[str, Any], dims: int
    ) -> LayerCall | None:
        given = [value for value in (weight, bias) if value is not None]
        if not isinstance(x, Node) or self.is_constant(x) or not all(map(self.is_constant, given)):
            return None
        layer = Layer(self.constant(weight), None if bias is None else self.constant(bias), **sizes)
        return LayerCall(node, x, weight, bias, layer, node.meta["val"].dim() - 1 - dims)

    def affine(self, node: Any) -> AffineCall | None:
        """Return what `node` computes as an affine; None if it is none, or not of constants."""
        if not isinstance(node, Node) or node.op != "call_function":
            return None
        if node.target is aten.batch_norm.default:
            found = self._batch_norm(node)
        elif node.target in _ELEMENTWISE:
            found = self._elementwise(node)
        else:
            return None
        if found is None or not _one_dtype(node, found.x):
            return None
        if not same_shape(found.x.meta["val"].shape, node.meta["val"].shape):
            return None
        finite = found.affine.scale.isfinite().all() and found.affine.shift.isfinite().all()
        return found if finite else None

    def _batch_norm(self, node: Node) -> AffineCall | None:
        x, gamma, beta, mean, variance, training, _, eps, _ = arguments(node)
        given = [value for value in (gamma, beta, mean, variance) if value is not None]
        if training or mean is None or variance is None or not all(map(self.is_constant, given)):
            return None
        scale = torch.rsqrt(self.constant(variance).double() + eps)
        if isinstance(gamma, Node):
            scale = scale * self.constant(gamma).double()
        shift = -self.constant(mean).double() * scale
        if isinstance(beta, Node):
            shift = shift + self.constant(beta).double()
        return AffineCall(node, x, Affine(scale, shift), 1)

    def _elementwise(self, node: Node) -> AffineCall | None:
        one, zero = torch.ones(1).double(), torch.zeros(1).double()
        if node.target in _NEGS:
            (x,) = arguments(node)
            return AffineCall(node, x, Affine(-one, zero), None) if isinstance(x, Node) else None
        a, b, *rest = arguments(node)
        alpha = rest[0] if rest else 1
        if not isinstance(alpha, (int, float)):
            return None
        if node.target in _RSUBS:
            a, b = b, a
        constant, x = self._values(b, a), a
        turned = constant is None  # the constant is the first operand
        if turned:
            constant, x = self._values(a, b), b
        if constant is None or not isinstance(x, Node):
            return None
        c, axis = constant
        if node.target in _MULS:
            affine = Affine(c, zero)
        elif node.target in _DIVS:
            if turned:
                return None
            affine = Affine(1 / c, zero)
        else:
            sign = alpha if node.target in _ADDS else -alpha
            affine = Affine(one * sign, c) if turned else Affine(one, sign * c)
        return AffineCall(node, x, affine, axis)

    def _values(self, given: Any, x: Any) -> tuple[Tensor, int | None] | None:
        """Return a constant operand as a value per channel of `x`, and their axis."""
        if not isinstance(x, Node) or not isinstance(x.meta.get("val"), Tensor):
            return None
        if isinstance(given, (int, float)):
            return torch.tensor([float(given)], dtype=torch.float64), None
        if isinstance(given, Node) and given.target in _LIKE and not self.memory.is_written(given):
            return torch.tensor([_LIKE[given.target]], dtype=torch.float64), None
        if not self.is_constant(given) or self.is_constant(x):
            return None
        rank, shape = x.meta["val"].dim(), given.meta["val"].shape
        if len(shape) > rank or given.meta["val"].is_complex():
            return None
        value = self.constant(given).double()
        axes = [axis for axis, size in enumerate(shape, rank - len(shape)) if size != 1]
        if len(axes) > 1:
            return None
        return value.flatten(), axes[0] if axes else None


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal for all sizes that were declared."""
    return len(a) == len(b) and all(
        statically_known_true(one == other) for one, other in zip(a, b, strict=True)
    )


def _one_dtype(node: Node, *others: Node) -> bool:
    """Whether a call gives real numbers of the dtype that it was given."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype.is_floating_point and all(other.meta["val"].dtype is dtype for other in others)


def arguments(node: Node) -> list[Any]:
    """Return all arguments of a call, in the order of its schema; the defaults where none are."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    given = dict(enumerate(node.args))
    return [
        given.get(index, node.kwargs.get(argument.name, argument.default_value))
        for index, argument in enumerate(target._schema.arguments)
    ]


def each(value: Any, dims: int) -> tuple[int, ...]:
    """Return a size per dimension, of one for all or a list of them."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(values * dims if len(values) == 1 else values)
