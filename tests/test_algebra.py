"""The algebra of linear layers is exact: in float64 each formula agrees with torch's own layers."""

from itertools import product
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchfuse.algebra import (
    Affine,
    Layer,
    after,
    as_layer,
    average_pool,
    before,
    compose,
    padded,
    plus,
    regrouped,
    then,
    trimmed,
)
from torchfuse.planning import Refusal

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def run(layer: Layer | Refusal, x: Tensor) -> Tensor:
    assert isinstance(layer, Layer), layer
    if not layer.kernel:
        return F.linear(x, layer.weight, layer.bias)
    sizes = (layer.stride, layer.padding)
    if layer.transposed:
        function = CONV_TRANSPOSE[len(layer.kernel)]
        rest = (layer.output_padding, layer.groups, layer.dilation)
    else:
        function, rest = CONV[len(layer.kernel)], (layer.dilation, layer.groups)
    return function(x, layer.weight, layer.bias, *sizes, *rest)


def apply(affine: Affine, x: Tensor, axis: int = 1) -> Tensor:
    shape = [1] * x.dim()
    shape[axis] = -1
    return x * affine.scale.reshape(shape) + affine.shift.reshape(shape)


def drawn_affine(channels: int) -> Affine:
    return Affine(torch.randn(channels).double(), torch.randn(channels).double())


def conv(
    random: Random,
    into: int,
    out: int,
    dims: int = 2,
    *,
    kernel: int | None = None,
    stride: int | None = None,
    padding: int | None = None,
    dilation: int | None = None,
    groups: int | None = None,
    bias: bool | None = None,
    transposed: bool = False,
) -> Layer:
    def each(given: int | None, choices: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(random.choice(choices) if given is None else given for _ in range(dims))

    sizes = each(kernel, (1, 2, 3))
    common = [g for g in (1, 2, 4) if into % g == out % g == 0]
    groups = random.choice(common) if groups is None else groups
    shape = (into, out // groups) if transposed else (out, into // groups)
    with_bias = random.random() < 0.5 if bias is None else bias
    return Layer(
        torch.randn(*shape, *sizes).double(),
        torch.randn(out).double() if with_bias else None,
        each(stride, (1, 2)),
        each(padding, (0, 1)),
        each(dilation, (1, 2)),
        groups,
        transposed,
        (0,) * dims if transposed else (),
    )


def image(channels: int, dims: int = 2) -> Tensor:
    return torch.randn(2, channels, *(9, 8, 7)[:dims]).double()


def same(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-12 * (1 + b.abs().max())


SEEDS = range(24)


@pytest.fixture(params=SEEDS)
def random(request: pytest.FixtureRequest) -> Random:
    torch.manual_seed(request.param)
    return Random(request.param)


def test_an_affine_after_any_layer_is_taken_in(random: Random) -> None:
    for dims, transposed in product((1, 2, 3), (False, True)):
        layer, affine = conv(random, 4, 8, dims, transposed=transposed), drawn_affine(8)
        x = image(4, dims)
        same(run(after(affine, layer), x), apply(affine, run(layer, x)))
    linear, x = Layer(torch.randn(5, 4).double(), None), torch.randn(2, 3, 4).double()
    affine = drawn_affine(5)
    same(run(after(affine, linear), x), apply(affine, run(linear, x), -1))


def test_an_affine_before_a_layer_without_padding_is_taken_in(random: Random) -> None:
    for dims in (1, 2, 3):
        layer, affine, x = conv(random, 4, 8, dims, padding=0), drawn_affine(4), image(4, dims)
        same(run(before(layer, affine), x), run(layer, apply(affine, x)))
    linear, x = Layer(torch.randn(5, 4).double(), torch.randn(5).double()), image(4, 1)[..., :4]
    affine = drawn_affine(4)
    same(run(before(linear, affine), x), run(linear, apply(affine, x, -1)))


def test_before_padding_a_scale_is_taken_in_and_a_shift_is_refused(random: Random) -> None:
    scale = Affine(torch.randn(4).double(), torch.zeros(1).double())
    for transposed in (False, True):
        layer, x = conv(random, 4, 8, padding=1, transposed=transposed), image(4)
        same(run(before(layer, scale), x), run(layer, apply(scale, x)))
        refusal = before(layer, drawn_affine(4))
        assert isinstance(refusal, Refusal)
        assert "shift" in refusal.reason


def test_two_affines_are_one() -> None:
    torch.manual_seed(0)
    a, b, x = drawn_affine(4), drawn_affine(4), image(4)
    same(apply(then(a, b), x), apply(b, apply(a, x)))


def test_layers_in_a_row_are_composed(random: Random) -> None:
    for dims in (1, 2, 3):
        first, second = conv(random, 4, 8, dims), conv(random, 8, 4, dims, padding=0)
        x = torch.randn(2, 4, *(15, 14, 13)[:dims]).double()
        same(run(compose(first, second), x), run(second, run(first, x)))
    first, second = (
        Layer(torch.randn(6, 4).double(), None),
        Layer(torch.randn(3, 6).double(), torch.randn(3).double()),
    )
    x = torch.randn(2, 4).double()
    same(run(compose(first, second), x), run(second, run(first, x)))


def test_a_pointwise_layer_without_a_bias_is_composed_before_padding(random: Random) -> None:
    first = conv(random, 4, 8, kernel=1, stride=1, padding=0, bias=False)
    second, x = conv(random, 8, 4, padding=1), image(4)
    same(run(compose(first, second), x), run(second, run(first, x)))
    biased = conv(random, 4, 8, kernel=1, stride=1, padding=0, bias=True)
    assert isinstance(compose(biased, second), Refusal)
    assert isinstance(compose(conv(random, 4, 8, kernel=3), second), Refusal)


def test_layers_side_by_side_are_added(random: Random) -> None:
    """Where their outputs have one size; whatever their kernels, paddings, groups, dilations."""
    added = 0
    for dims in (1, 2):
        stride, x = random.choice((1, 2)), image(4, dims)
        for _ in range(20):
            a, b = (conv(random, 4, 8, dims, stride=stride) for _ in range(2))
            if run(a, x).shape != run(b, x).shape:
                continue
            total = plus(a, b)
            if isinstance(total, Refusal):
                assert "grid" in total.reason
                continue
            if run(total, x).shape == run(a, x).shape:  # (what the host looks at)
                same(run(total, x), run(a, x) + run(b, x))
                added += 1
    assert added


def test_an_identity_an_affine_and_an_average_pool_are_layers(random: Random) -> None:
    like, x = conv(random, 4, 4, kernel=3, stride=1, padding=1, dilation=1), image(4)
    affine = drawn_affine(4)
    pool = average_pool(4, (3, 3), (1, 1), (1, 1))
    total = plus(like, as_layer(None, like))
    total = plus(plus(total, as_layer(affine, like)), pool)
    expected = run(like, x) + x + apply(affine, x) + F.avg_pool2d(x, 3, 1, 1)
    same(run(total, x), expected)
    linear, row = Layer(torch.randn(4, 4).double(), None), torch.randn(3, 4).double()
    same(
        run(plus(linear, as_layer(affine, linear)), row),
        run(linear, row) + apply(affine, row, -1),
    )


def test_fewer_groups_compute_the_same(random: Random) -> None:
    layer, x = conv(random, 8, 8, groups=4), image(8)
    for groups in (1, 2, 4):
        same(run(regrouped(layer, groups), x), run(layer, x))


def test_zeros_around_the_input_are_padding(random: Random) -> None:
    layer, x = conv(random, 4, 8), image(4)
    same(run(padded(layer, (2, 1)), x), run(layer, F.pad(x, (1, 1, 2, 2))))


def test_what_has_no_exact_form_is_refused_with_a_sentence() -> None:
    random = Random(0)
    a = conv(random, 4, 4, kernel=3, stride=1, dilation=1)
    for refusal in (
        plus(a, conv(random, 4, 8)),
        plus(a, conv(random, 4, 4, kernel=3, stride=2)),
        plus(a, conv(random, 4, 4, kernel=3, stride=1, dilation=2)),
        plus(conv(random, 4, 4, kernel=2, stride=1, transposed=True),
             conv(random, 4, 4, kernel=3, stride=1, transposed=True)),
        as_layer(None, conv(random, 4, 8)),
        as_layer(None, conv(random, 4, 4, stride=2)),
        after(drawn_affine(3), a),
        before(a, drawn_affine(3)),
        compose(a, conv(random, 8, 4)),
        compose(conv(random, 4, 4, transposed=True), a),
    ):  # fmt: skip
        assert isinstance(refusal, Refusal)
        assert refusal.reason.endswith(".")


def test_a_weight_that_would_fill_the_memory_is_not_made() -> None:
    depthwise = Layer(torch.ones(4096, 1, 7, 7).double(), None, (1, 1), (3, 3), (1, 1), 4096)
    one = torch.ones(1, 1, 1, 1).double()
    wide = Layer(one.expand(4096, 4096, 1, 1), None, (1, 1), (0, 0), (1, 1))
    for refusal in (plus(depthwise, wide), compose(depthwise, wide)):
        assert isinstance(refusal, Refusal)
        assert "elements in place of" in refusal.reason


@pytest.mark.parametrize("seed", range(20))
def test_a_convolution_pads_one_side_more_with_zeros_in_its_kernel(seed: int) -> None:
    torch.manual_seed(seed)
    random = Random(seed)
    layer = conv(random, 3, 4)
    x = torch.randn(2, 3, 14, 13).double()
    steps = [random.choice((-2, -1, 0, 1, 2)) * dilation for dilation in layer.dilation]
    begin = (4 + steps[0], 5)
    end = (4, 5 + steps[1])
    expected = run(layer, F.pad(x, (begin[1], end[1], begin[0], end[0])))
    wide = padded(layer, begin, end)
    same(run(wide, x), expected)
    assert isinstance(wide, Layer)
    kept, before_, after_ = trimmed(wide)
    assert kept.kernel == layer.kernel  # what was added is found again
    around = (before_[1], after_[1], before_[0], after_[0])
    same(run(kept, F.pad(x, around)), expected)
    assert all(min(pair) == 0 for pair in zip(before_, after_, strict=True))


def test_zeros_that_do_not_lie_in_the_padding_are_not_trimmed() -> None:
    weight = torch.zeros(1, 1, 5).double()
    layer = Layer(weight, None, (1,), (1,), (1,))
    kept, before_, after_ = trimmed(layer)
    x = torch.randn(1, 1, 9).double()
    same(run(kept, F.pad(x, (*before_, *after_))), run(layer, x))
    weight[0, 0, 2] = 1
    kept, before_, after_ = trimmed(layer)
    assert (kept.kernel, kept.padding, before_, after_) == ((3,), (0,), (0,), (0,))
    same(run(kept, x), run(layer, x))


def test_a_padding_off_the_grid_of_the_taps_is_refused() -> None:
    layer = Layer(torch.ones(1, 1, 2).double(), None, (1,), (0,), (3,))
    found = padded(layer, (2,), (1,))
    assert found == Refusal("What one side is padded more is no multiple of the dilation.")
