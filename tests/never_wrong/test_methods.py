"""Other public methods than `forward` stay right."""

from collections.abc import Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import torchfuse
from support.fusing_checks import IMAGE, ConvBn, assert_fuses, assert_skipped, check, trained


def test_a_public_method_that_returns_the_conv_output_is_skipped() -> None:
    class Model(ConvBn):
        def forward_features(self, x: Tensor) -> Tensor:
            return self.conv(x)

    assert_skipped(
        trained(Model(), IMAGE), IMAGE, because="forward_features", methods=("forward_features",)
    )


def test_a_public_method_that_skips_the_batch_norm_is_skipped_yolo() -> None:
    class Model(ConvBn):
        def forward_fuse(self, x: Tensor) -> Tensor:
            return F.silu(self.conv(x))

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.bn(self.conv(x)))

    check(trained(Model(), IMAGE), IMAGE, methods=("forward_fuse",))


def test_a_method_that_goes_through_forward_is_no_obstacle() -> None:
    class Model(ConvBn):
        def predict(self, x: Tensor) -> Tensor:
            return self(x).argmax(1)

    assert_fuses(trained(Model(), IMAGE), IMAGE, methods=("predict",))


def test_a_method_of_the_owner_of_the_block_is_seen() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = ConvBn()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

        def hidden(self, x: Tensor) -> Tensor:
            return self.block.conv(x)

    check(trained(Outer(), IMAGE), IMAGE, methods=("hidden",))


def test_a_method_that_calls_the_method_of_the_same_name_of_a_block_is_seen() -> None:
    class Block(ConvBn):
        def forward_features(self, x: Tensor) -> Tensor:
            return self.conv(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

        def forward_features(self, x: Tensor) -> Tensor:
            return self.block.forward_features(x)

    assert_skipped(
        trained(Outer(), IMAGE), IMAGE, because="forward_features", methods=("forward_features",)
    )


def test_a_method_that_reaches_modules_by_index_is_seen() -> None:
    class Model(nn.Sequential):
        def stem(self, x: Tensor) -> Tensor:
            return self[0](x)

    model = trained(Model(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), IMAGE)
    check(model, IMAGE, methods=("stem",))


def test_a_method_that_reaches_modules_by_name_is_seen() -> None:
    class Model(ConvBn):
        def at(self, x: Tensor) -> Tensor:
            return dict(self.named_children())["conv"](x)

    check(trained(Model(), IMAGE), IMAGE, methods=("at",))


def test_a_method_inherited_from_a_base_class_is_seen() -> None:
    class Base(ConvBn):
        def features(self, x: Tensor) -> Tensor:
            return self.conv(x)

    class Model(Base):
        pass

    check(trained(Model(), IMAGE), IMAGE, methods=("features",))


def test_a_sequential_within_a_sequential_is_adjacent_by_structure() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)),
    )
    assert_fuses(trained(model, IMAGE), IMAGE, times=2)


def test_a_private_helper_that_another_public_method_calls_by_itself_is_seen() -> None:
    class Model(ConvBn):
        def _stem(self, x: Tensor) -> Tensor:
            return self.conv(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self._stem(x))

        def features(self, x: Tensor) -> Tensor:
            return self._stem(x)

    assert_skipped(
        trained(Model(), IMAGE), IMAGE, because="Model.features calls", methods=("features",)
    )


def test_a_method_of_a_block_that_the_model_calls_by_itself_is_seen_densenet() -> None:
    class Layer(ConvBn):
        def bn_function(self, x: Tensor) -> Tensor:
            return self.conv(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.bn_function(x))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

        def bottleneck(self, x: Tensor) -> Tensor:
            return self.layer.bn_function(x)

    assert_skipped(
        trained(Outer(), IMAGE), IMAGE, because="Outer.bottleneck calls", methods=("bottleneck",)
    )


def test_a_module_found_by_a_getattr_of_the_class_is_seen() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ConvBn()

        def __getattr__(self, name: str) -> object:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

        def stem(self, x: Tensor) -> Tensor:
            return self.conv(x)

    assert_skipped(trained(Outer(), IMAGE), IMAGE, because="stem", methods=("stem",))


def test_a_method_that_names_the_model_otherwise_or_puts_it_in_a_list_is_seen() -> None:
    class Renamed(ConvBn):
        def features(self, x: Tensor) -> Tensor:
            model = self
            return model.conv(x)

    class Listed(ConvBn):
        def features(self, x: Tensor) -> Tensor:
            return [self][0].conv(x)

    class ByDict(ConvBn):
        def features(self, x: Tensor) -> Tensor:
            return self.__dict__["_modules"]["conv"](x)

    for model in (Renamed(), Listed(), ByDict()):
        assert_skipped(trained(model, IMAGE), IMAGE, because="features", methods=("features",))


class _Item:
    """Stands in a class in place of a method, and reaches a module of the object."""

    def __get__(self, model: nn.Module, owner: type) -> object:
        return lambda x: model.conv(x)


class HeldInATuple(ConvBn):
    def __init__(self) -> None:
        super().__init__()
        self.tap = (self.conv,)

    def features(self, x: Tensor) -> Tensor:
        return self.tap[0](x)


class HeldInAnObject(ConvBn):
    def __init__(self) -> None:
        super().__init__()
        self.tools = SimpleNamespace(stem=self.conv)

    def features(self, x: Tensor) -> Tensor:
        return self.tools.stem(x)


class BoundMethod(ConvBn):
    def __init__(self) -> None:
        super().__init__()
        self.features = self.conv.forward


class ByItem(ConvBn):
    def __getitem__(self, index: int) -> nn.Module:
        return [self.conv, self.bn][index]

    def features(self, x: Tensor) -> Tensor:
        return self[0](x)


class Unpacked(ConvBn):
    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self.conv, self.bn])

    def features(self, x: Tensor) -> Tensor:
        first, _ = self
        return first(x)


class Matched(ConvBn):
    def features(self, x: Tensor) -> Tensor:
        match self:
            case ConvBn(conv=found):
                return found(x)


class Described(ConvBn):
    features = _Item()


class ChosenNames(ConvBn):
    def features(self, x: Tensor) -> Tensor:
        model = self if x.dim() else None
        return model.conv(x)


class _OnlyConv(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class PastTheOverride(_OnlyConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(super().forward(x))

    def features(self, x: Tensor) -> Tensor:
        return super().forward(x)


class FoundDeepDown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = ConvBn()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)

    def features(self, x: Tensor) -> Tensor:
        return dict(self.named_modules())["block.conv"](x)


class WeightsOfAll(ConvBn):
    def features(self, x: Tensor) -> Tensor:
        return sum(m.weight * 2 for m in self.modules() if isinstance(m, nn.Conv2d))


class PartsOfAComputedWeight(ConvBn):
    def __init__(self) -> None:
        super().__init__(parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))

    def features(self, x: Tensor) -> Tensor:
        return x * self.conv.parametrizations.weight.original0.mean()


@pytest.mark.parametrize(
    "class_",
    [
        HeldInATuple,
        HeldInAnObject,
        BoundMethod,
        ByItem,
        Unpacked,
        Matched,
        Described,
        ChosenNames,
        PastTheOverride,
        FoundDeepDown,
        WeightsOfAll,
        PartsOfAComputedWeight,
    ],
)
def test_other_paths_to_a_layer_are_seen(class_: type[nn.Module]) -> None:
    model = trained(class_(), IMAGE)
    assert_skipped(model, IMAGE, because="conv|bn", methods=("features",))


def test_a_function_in_an_attribute_that_reaches_the_conv_is_seen() -> None:
    def stem(model: nn.Module, x: Tensor) -> Tensor:
        return model.conv(x)

    bound, closed, closed_over_the_conv = (trained(ConvBn(), IMAGE) for _ in range(3))
    bound.stem = MethodType(stem, bound)
    closed.stem = lambda x: closed.conv(x)
    conv = closed_over_the_conv.conv
    closed_over_the_conv.stem = lambda x: conv(x)
    for model in (bound, closed, closed_over_the_conv):
        expected = model.stem(IMAGE)
        result = torchfuse.fuse(model, IMAGE, inplace=True, verify=False)
        assert any("`stem`" in skip.reason for skip in result.plan.skips), str(result.plan)
        assert torch.equal(model.stem(IMAGE), expected)


def test_a_method_whose_source_is_not_there_is_judged_by_the_names_in_it() -> None:
    space: dict[str, Any] = {"ConvBn": ConvBn, "__name__": __name__}
    exec(
        "class Made(ConvBn):\n"
        "    def features(self, x):\n"
        "        return self.conv(x)\n"
        "class Harmless(ConvBn):\n"
        "    def predict(self, x):\n"
        "        return self(x).argmax(1)\n",
        space,
    )
    assert_skipped(
        trained(space["Made"](), IMAGE), IMAGE, because="features", methods=("features",)
    )
    assert_fuses(trained(space["Harmless"](), IMAGE), IMAGE, methods=("predict",))


def test_a_method_that_only_the_forward_of_its_block_calls_is_named_in_the_scope_densenet() -> None:
    class Layer(ConvBn):
        def bn_function(self, x: Tensor) -> Tensor:
            return self.conv(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.bn_function(x))

    model = nn.Sequential(nn.ReLU(), Layer())
    scope = assert_fuses(trained(model, IMAGE), IMAGE).plan.scope
    assert any("called from outside, 1.bn_function would see a folded" in line for line in scope)


class _Sized(ConvBn):
    def size_of_map(self, side: int) -> int:
        return side // self.conv.stride[0]


class _Layered(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class AsksItsFirstBlocks(_Layered):
    """nnU-Net's way to foresee how much memory a net takes."""

    def size_of_maps(self, side: int) -> int:
        return sum(block.size_of_map(side) for block in self.layers[:1])


class LoopsOverTheFirstLayers(_Layered):
    def features(self, x: Tensor) -> Tensor:
        for layer in self.layers[:1]:
            x = layer(x)
        return x


class LoopsOverAFirstBlock(_Layered):
    def features(self, x: Tensor) -> Tensor:
        for block in self.layers[:1]:
            x = F.relu(block.conv(x))
        return x


class GoesIntoAFirstBlock(_Layered):
    def features(self, x: Tensor) -> Tensor:
        for block in self.layers[:1]:
            x = F.relu(block[0](x))
        return x


def test_a_method_that_loops_over_a_part_of_a_sequence_reaches_its_children() -> None:
    asking = AsksItsFirstBlocks(_Sized(), nn.Conv2d(4, 4, 1))
    assert_fuses(trained(asking, IMAGE), IMAGE)
    for model in (
        LoopsOverTheFirstLayers(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        LoopsOverAFirstBlock(ConvBn(), nn.Conv2d(4, 4, 1)),
        GoesIntoAFirstBlock(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), nn.ReLU()),
    ):
        assert_skipped(trained(model, IMAGE), IMAGE, because="features", methods=("features",))


def _load(model: nn.Module, path: str) -> None:
    model.load_state_dict(torch.load(path, weights_only=True))


class Loading(ConvBn):
    """docTR's way to weights."""

    def from_pretrained(self, path: str, **options: Any) -> None:
        _load(self, path, **options)


def _collect(model: ConvBn, x: Tensor, into: list[Tensor]) -> None:
    into.append(model.conv(x))


class Collecting(ConvBn):
    def collect(self, x: Tensor, into: list[Tensor]) -> None:
        _collect(self, x, into)

    def features(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        self.collect(x, into=found)
        return found[0]


class Keeping(ConvBn):
    """It only is named as if it loaded weights."""

    def load_pretrained(self, x: Tensor) -> None:
        self.found = next(child(x) for child in self.children())

    def features(self, x: Tensor) -> Tensor:
        self.load_pretrained(x)
        return self.found


def test_a_method_that_loads_weights_is_no_obstacle_and_one_that_fills_an_argument_is() -> None:
    assert_fuses(trained(Loading(), IMAGE), IMAGE)
    attached = trained(ConvBn(), IMAGE)
    attached.from_pretrained = MethodType(Loading.from_pretrained, attached)
    assert_fuses(attached, IMAGE)
    for model, name in ((Collecting(), "collect"), (Keeping(), "load_pretrained")):
        assert_skipped(trained(model, IMAGE), IMAGE, because=name, methods=("features",))
    attached = trained(ConvBn(), IMAGE)
    attached.collect = MethodType(Collecting.collect, attached)
    assert_skipped(attached, IMAGE, because="`collect`")
