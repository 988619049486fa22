"""What torch's own eight tests of eager fusion ask for, asked of our functions.

They follow test/quantization/eager/test_fuse_eager.py of PyTorch, on the same helper models, which
are in the wheel. The deliberate differences are listed in `docs/fuse_modules.md`.
"""

import copy
import warnings

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.quantized as nnq
from torch import nn
from torch.ao import quantization as ao

import torchfuse
from torchfuse.errors import FusionWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's test module imports old names
    from torch.testing._internal.common_quantization import (
        ModelForFusion,
        ModelForFusionWithBias,
        ModelForLinearBNFusion,
        ModelWithSequentialFusion,
    )

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor.*deprecated"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),
    pytest.mark.filterwarnings("ignore:_aminmax is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:must run observer before calling:UserWarning"),
    pytest.mark.filterwarnings("ignore:Default qconfig of oneDNN:UserWarning"),  # no VNNI
]

INPUT_1D = torch.rand(2, 3, 10, generator=torch.Generator().manual_seed(0))
INPUT_2D = torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(1))
SEQUENTIAL = [
    ["conv1", "relu1"],
    ["features.0.0", "features.0.1", "features.0.2"],
    ["features.1.0", "features.1.1", "features.1.2"],
    ["features.2.0", "features.2.1", "features.2.2"],
    ["classifier.0", "classifier.1"],
]
ENGINES = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]


@pytest.fixture(params=ENGINES)
def engine(request):
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = request.param
    yield request.param
    torch.backends.quantized.engine = before


def types(model, *names):
    return [type(model.get_submodule(name)) for name in names]


def run_a_training_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    loss = model(INPUT_1D).float().square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_fuse_module_train():
    model = ModelForFusion(ao.default_qat_qconfig).train()
    model = torchfuse.fuse_modules_qat(model, ["conv1", "bn1", "relu1"])
    model = torchfuse.fuse_modules_qat(model, ["sub1.conv", "sub1.bn"])
    untouched = [nn.Conv2d, nn.ReLU]
    assert types(model, "conv1", "bn1", "relu1") == [nni.ConvBnReLU2d, nn.Identity, nn.Identity]
    assert types(model, "sub1.conv", "sub1.bn") == [nni.ConvBn2d, nn.Identity]
    assert types(model, "sub2.conv", "sub2.relu") == untouched

    model = ao.prepare_qat(model)
    assert types(model, "conv1", "bn1", "relu1") == [nniqat.ConvBnReLU2d, nn.Identity, nn.Identity]
    assert types(model, "sub1.conv", "sub1.bn") == [nniqat.ConvBn2d, nn.Identity]
    assert types(model, "sub2.conv", "sub2.relu") == untouched

    run_a_training_step(model)
    model = ao.convert(model)
    assert types(model, "conv1", "sub1.conv") == [nniq.ConvReLU2d, nnq.Conv2d]
    assert types(model, "sub2.conv", "sub2.relu") == untouched


def test_fuse_module_eval():
    lists = [
        ["conv3", "bn3", "relu4"],
        ["conv1", "bn1", "relu1"],
        ["conv2", "relu2"],
        ["bn2", "relu3"],
        ["sub1.conv", "sub1.bn"],
    ]
    model = torchfuse.fuse_modules(ModelForFusion(ao.default_qconfig).eval(), lists)
    assert types(model, "conv1", "conv1.0", "conv1.1") == [nni.ConvReLU2d, nn.Conv2d, nn.ReLU]
    assert types(model, "conv2", "conv2.0", "conv2.1") == [nni.ConvReLU3d, nn.Conv3d, nn.ReLU]
    assert types(model, "conv3", "conv3.0", "conv3.1") == [nni.ConvReLU1d, nn.Conv1d, nn.ReLU]
    assert types(model, "bn2", "sub1.conv") == [nni.BNReLU3d, nn.Conv2d]
    absorbed = ["bn1", "relu1", "relu2", "relu3", "bn3", "sub1.bn"]
    assert types(model, *absorbed) == [nn.Identity] * len(absorbed)
    assert types(model, "sub2.conv", "sub2.relu") == [nn.Conv2d, nn.ReLU]

    model = ao.prepare(model)
    model(INPUT_1D)
    model = ao.convert(model)
    assert types(model, "conv3", "conv1") == [nniq.ConvReLU1d, nniq.ConvReLU2d]
    assert types(model, "sub1.conv", "bn2") == [nnq.Conv2d, nniq.BNReLU3d]
    assert types(model, "sub2.conv", "sub2.relu") == [nn.Conv2d, nn.ReLU]
    assert torch.isfinite(model(INPUT_1D)).all()
    assert not any(hasattr(module, "qconfig") for module in model.modules())


def test_fusion_sequential_model_train(engine):
    model = ModelWithSequentialFusion().train()
    torchfuse.fuse_modules_qat(model, SEQUENTIAL, inplace=True)
    assert types(model, "conv1", "conv1.0", "conv1.1") == [nni.ConvReLU2d, nn.Conv2d, nn.ReLU]
    for i in range(3):
        assert type(model.features[i][0]) is nni.ConvBnReLU2d
        assert type(model.features[i][1]) is type(model.features[i][2]) is nn.Identity
    assert types(model, "classifier.0", "classifier.1") == [nni.LinearReLU, nn.Identity]

    model.qconfig = ao.get_default_qat_qconfig(engine)
    ao.prepare_qat(model, inplace=True)
    assert types(model, "conv1", "features.0.0") == [nniqat.ConvReLU2d, nniqat.ConvBnReLU2d]
    assert types(model, "classifier.0") == [nniqat.LinearReLU]
    model(INPUT_2D)
    ao.convert(model, inplace=True)
    assert torch.isfinite(model(INPUT_2D)).all()
    assert_sequential_model_is_quantized(model)


def test_fusion_sequential_model_eval(engine):
    model = ModelWithSequentialFusion().eval()
    torchfuse.fuse_modules(model, SEQUENTIAL, inplace=True)
    assert types(model, "conv1", "conv1.0", "conv1.1") == [nni.ConvReLU2d, nn.Conv2d, nn.ReLU]
    for i in range(3):
        assert type(model.features[i][0]) is nni.ConvReLU2d
        assert type(model.features[i][1]) is type(model.features[i][2]) is nn.Identity
    assert types(model, "classifier.0", "classifier.1") == [nni.LinearReLU, nn.Identity]

    model.qconfig = ao.get_default_qconfig(engine)
    ao.prepare(model, inplace=True)
    model(INPUT_2D)
    ao.convert(model, inplace=True)
    assert torch.isfinite(model(INPUT_2D)).all()
    assert_sequential_model_is_quantized(model)


def assert_sequential_model_is_quantized(model):
    assert types(model, "conv1", "relu1") == [nniq.ConvReLU2d, nn.Identity]
    for i in range(3):
        assert type(model.features[i][0]) is nniq.ConvReLU2d
        assert type(model.features[i][1]) is type(model.features[i][2]) is nn.Identity
    assert types(model, "classifier.0", "classifier.1") == [nniq.LinearReLU, nn.Identity]


def test_fusion_conv_with_bias(engine):
    original = ModelForFusionWithBias().train()
    reference = copy.deepcopy(original)
    expected = reference(INPUT_2D)

    original.qconfig = ao.QConfig(activation=nn.Identity, weight=nn.Identity)
    model = torchfuse.fuse_modules_qat(original, [["conv1", "bn1", "relu1"], ["conv2", "bn2"]])
    prepared = ao.prepare_qat(model, inplace=False)
    torch.testing.assert_close(prepared(INPUT_2D), expected)
    for before, after in ((reference.bn1, prepared.conv1.bn), (reference.bn2, prepared.conv2.bn)):
        torch.testing.assert_close(dict(after.state_dict()), dict(before.state_dict()))

    model.qconfig = ao.get_default_qat_qconfig(engine)
    ao.prepare_qat(model, inplace=True)
    model(INPUT_2D)
    assert types(model, "conv1", "bn1", "relu1") == [nniqat.ConvBnReLU2d, nn.Identity, nn.Identity]
    assert types(model, "conv2", "bn2") == [nniqat.ConvBn2d, nn.Identity]


def test_fusion_linear_bn_eval():
    model = ModelForLinearBNFusion().train()
    torch.manual_seed(0)
    model(torch.randn(8, 20))  # running statistics other than 0 and 1
    model.eval()
    inputs = torch.randn(8, 20)
    expected = model(inputs)
    fused = torchfuse.fuse_modules(model, [["fc", "bn"]])
    assert type(fused.bn) is nn.Identity
    torch.testing.assert_close(fused(inputs), expected)


def test_forward_hooks_preserved():
    model = ModelForFusion(ao.default_qat_qconfig).train()
    calls = []
    model.conv1.register_forward_pre_hook(lambda m, _: calls.append(("pre", type(m))))
    model.sub1.conv.register_forward_pre_hook(lambda m, _: calls.append(("pre", type(m))))
    model.relu1.register_forward_hook(lambda m, *_: calls.append(("post", type(m))))
    model.sub1.bn.register_forward_hook(lambda m, *_: calls.append(("post", type(m))))
    model(INPUT_1D)
    assert len(calls) == 4

    model = torchfuse.fuse_modules_qat(model, ["conv1", "bn1", "relu1"])
    model = torchfuse.fuse_modules_qat(model, ["sub1.conv", "sub1.bn"])
    calls.clear()
    model(INPUT_1D)
    assert calls == [
        ("pre", nni.ConvBnReLU2d),
        ("post", nni.ConvBnReLU2d),
        ("pre", nni.ConvBn2d),
        ("post", nni.ConvBn2d),
    ]


def test_fuse_modules_with_nested_hooks(engine):
    model = ModelWithSequentialFusion().eval()
    for sequential in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for layer in sequential:
            layer.register_forward_hook(lambda *_: None)
    # A deliberate difference: torch loses the hooks in the middle without a word.
    with pytest.warns(FusionWarning, match=r"forward hook of features\.\d\.1:"):
        torchfuse.fuse_modules(model, SEQUENTIAL[1:], inplace=True)
    assert [type(model.features[i][0]) for i in range(3)] == [nni.ConvReLU2d] * 3
    assert types(model, "classifier.0", "classifier.1") == [nni.LinearReLU, nn.Identity]
