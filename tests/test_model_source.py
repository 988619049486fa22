"""MODEL, --input and --weights: what they accept, and one sentence for what they do not."""

import logging
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from torchfuse.errors import InputError
from torchfuse.model_source import InputSpec, ModelSource, load, parse_input, parse_source

NETS = """
import torch
from torch import nn
from dataclasses import dataclass


@dataclass
class Width:
    channels: int = 4


class Nets:
    small = staticmethod(lambda: nn.Linear(2, 2))


def small_net():
    return nn.Conv2d(3, Width().channels, 3)


def with_inputs():
    return nn.Linear(2, 3), torch.ones(5, 2)


def needs_width(width):
    return nn.Linear(width, width)


def not_a_model():
    return "model"


ready = nn.ReLU()
number = 3
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return path


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("nets.py:small", ModelSource(Path("nets.py"), None, "small")),
        ("a/b/nets.py:Nets.small", ModelSource(Path("a/b/nets.py"), None, "Nets.small")),
        ("package.module:net", ModelSource(None, "package.module", "net")),
        ("module:net", ModelSource(None, "module", "net")),
        ("a/model.pt2", ModelSource(Path("a/model.pt2"), None, None)),
    ],
)
def test_a_model_is_named_in_three_ways(text: str, source: ModelSource) -> None:
    assert parse_source(text) == source


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nets.py", r"names a file but no callable in it; write 'nets.py:callable'\."),
        ("resnet50", r"'resnet50' is not a MODEL: expected path/to/file\.py:callable"),
        ("model.onnx", r"'model\.onnx' is not a MODEL"),
        ("nets.py:", r"is not a MODEL"),
        ("", r"'' is not a MODEL"),
        ("a b:c", r"is not a MODEL"),
    ],
)
def test_other_model_names_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        parse_source(text)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("1x3x224x224", InputSpec(None, (1, 3, 224, 224), "float32")),
        ("1x128:int64", InputSpec(None, (1, 128), "int64")),
        ("mask=2x77:bool", InputSpec("mask", (2, 77), "bool")),
        ("7", InputSpec(None, (7,), "float32")),
    ],
)
def test_an_input_has_sizes_and_may_have_a_name_and_a_dtype(text: str, spec: InputSpec) -> None:
    assert parse_input(text) == spec


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1,3,224,224", r"'1,3,224,224' is not an input: expected sizes joined by x"),
        ("1x3xH", "is not an input"),
        ("=1x3", "is not an input"),
        ("1x3:", "is not an input"),
        ("1x3:flaot32", r"the dtype 'flaot32', which is none of .*did you mean 'float32'"),
        ("1x-3", "is not an input"),
    ],
)
def test_other_inputs_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        parse_input(text)


def test_names_are_parsed_without_torch() -> None:
    code = "import sys, torchfuse.model_source as m; m.parse_input('1x3'); m.parse_source('a:b')"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=False
    )
    assert done.returncode == 0


def test_a_callable_of_a_file_is_called_and_its_model_put_in_eval_mode(nets: Path) -> None:
    loaded = load(f"{nets}:small_net", ["1x3x8x8"])
    assert isinstance(loaded.model, nn.Conv2d)
    assert not loaded.model.training
    assert loaded.example_inputs.args[0].shape == (1, 3, 8, 8)


def test_a_callable_may_return_example_inputs_which_input_replaces(nets: Path) -> None:
    assert torch.equal(load(f"{nets}:with_inputs").example_inputs, torch.ones(5, 2))
    replaced = load(f"{nets}:with_inputs", ["4x2"]).example_inputs
    assert replaced.args[0].shape == (4, 2)


@pytest.mark.parametrize("attribute", ["ready", "Nets.small"])
def test_a_module_or_an_attribute_of_a_class_may_be_named(nets: Path, attribute: str) -> None:
    assert isinstance(load(f"{nets}:{attribute}", ["1x2"]).model, nn.Module)


def test_a_module_is_imported_from_the_current_folder(
    nets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets.rename(nets.with_name("nets_in_the_current_folder.py"))
    monkeypatch.chdir(nets.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    loaded = load("nets_in_the_current_folder:small_net", ["1x3x8x8"])
    assert isinstance(loaded.model, nn.Conv2d)


def test_inputs_are_always_the_same_and_named_ones_are_keywords(nets: Path) -> None:
    specs = ["1x3x8x8", "mask=1x8:bool", "ids=1x8:int64", "half=2:bfloat16"]
    first, second = (load(f"{nets}:small_net", specs).example_inputs for _ in range(2))
    assert first.kwargs.keys() == {"mask", "ids", "half"}
    assert [first.kwargs[name].dtype for name in ("mask", "ids", "half")] == [
        torch.bool,
        torch.int64,
        torch.bfloat16,
    ]
    assert set(first.kwargs["ids"].unique().tolist()) == {0, 1}
    assert torch.equal(first.args[0], second.args[0])
    assert first.args[0].std() > 0.5


@pytest.mark.parametrize(
    ("attribute", "inputs", "complaint"),
    [
        ("smal_net", ["1x3"], r"has no 'smal_net' \(did you mean 'small_net'"),
        ("small_net", [], r"without example inputs; add --input .* or return \(model, example"),
        ("needs_width", ["1x3"], r"called without arguments, but it raised TypeError: .*width"),
        ("not_a_model", ["1x3"], r"must return a torch.nn.Module, .* got str\."),
        ("number", ["1x3"], r"is int, not a callable that returns a model"),
        ("ready", ["a=1", "a=2"], r"--input a=… is given twice"),
    ],
)
def test_a_callable_that_gives_no_model_is_an_error(
    nets: Path, attribute: str, inputs: list[str], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        load(f"{nets}:{attribute}", inputs)


def test_missing_files_and_modules_are_errors_with_near_matches(nets: Path) -> None:
    with pytest.raises(InputError, match=r"net\.py' does not exist \(did you mean 'nets\.py'\?\)"):
        load(f"{nets.with_name('net.py')}:small_net", ["1x3"])
    with pytest.raises(InputError, match=r"folder .*missing' of .* does not exist"):
        load(f"{nets.parent / 'missing' / 'nets.py'}:small_net", ["1x3"])
    with pytest.raises(InputError, match=r"no module 'no_such_package' to import"):
        load("no_such_package.nets:small", ["1x3"])
    with pytest.raises(InputError, match=r"m\.pt2' does not exist"):
        load(str(nets.with_name("m.pt2")))


def test_an_error_in_the_file_is_reported_in_one_sentence(nets: Path) -> None:
    nets.write_text("import no_such_dependency\n")
    with pytest.raises(InputError, match=r"raised ModuleNotFoundError: No module named 'no_such"):
        load(f"{nets}:small_net", ["1x3"])
    nets.write_text("def broken(:\n")
    with pytest.raises(InputError, match=r"Running '.*nets\.py' raised SyntaxError"):
        load(f"{nets}:small_net", ["1x3"])


def test_an_exported_program_is_loaded_with_the_inputs_it_was_saved_with(tmp_path: Path) -> None:
    path = tmp_path / "linear.pt2"
    program = torch.export.export(nn.Linear(2, 3), (torch.ones(4, 2),))
    torch.export.save(program, path)
    loaded = load(str(path))
    assert isinstance(loaded.model, torch.export.ExportedProgram)
    assert loaded.example_inputs.args[0].shape == (4, 2)
    with pytest.raises(InputError, match=r"holds its own weights; leave out --weights w\.pt"):
        load(str(path), weights=Path("w.pt"))


def test_weights_that_nothing_fills_in_are_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\ndef net(): return nn.Linear(2, 3)\n")
    before = torch.get_rng_state()
    first, second = (load(f"{tmp_path / 'net.py'}:net", ["1x2"]).model for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_damaged_exported_program_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "damaged.pt2"
    path.write_bytes(b"PK\x03\x04 not a program")
    with pytest.raises(InputError, match=r"damaged\.pt2' is not an exported program"):
        load(str(path))


def test_why_an_exported_program_cannot_be_loaded_is_said_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "half.pt2"
    program = torch.export.export(nn.Linear(2, 3), (torch.ones(4, 2),))
    torch.export.save(program, path)
    path.write_bytes(path.read_bytes()[:-500])
    logging.getLogger("torch.export").addHandler(caplog.handler)
    try:
        with pytest.raises(InputError, match=r"half\.pt2' .* \(RuntimeError: PytorchStreamReader"):
            load(str(path))
    finally:
        logging.getLogger("torch.export").removeHandler(caplog.handler)
    assert not [each for each in caplog.records if each.name == "torch.export"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_are_loaded_from_a_checkpoint(nets: Path, tmp_path: Path, wrapped: bool) -> None:
    state = {"weight": torch.full((3, 2), 2.0), "bias": torch.zeros(3)}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "w.pt")
    model = load(f"{nets}:with_inputs", weights=tmp_path / "w.pt").model
    assert torch.equal(model.weight, state["weight"])


def test_weights_are_loaded_from_safetensors(nets: Path, tmp_path: Path) -> None:
    state = {"weight": torch.full((3, 2), 2.0), "bias": torch.zeros(3)}
    save_file(state, tmp_path / "w.safetensors")
    model = load(f"{nets}:with_inputs", weights=tmp_path / "w.safetensors").model
    assert torch.equal(model.weight, state["weight"])
    (tmp_path / "w.safetensors").write_bytes(b"\x00" * 4)
    with pytest.raises(InputError, match=r"is not a whole \.safetensors file"):
        load(f"{nets}:with_inputs", weights=tmp_path / "w.safetensors")


def test_a_checkpoint_that_holds_objects_is_not_unpickled(nets: Path, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3), tmp_path / "model.pt")
    with pytest.raises(InputError, match="not a checkpoint of tensors alone"):
        load(f"{nets}:with_inputs", weights=tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ({"weight": torch.zeros(3, 2)}, "1 of the model's keys are missing, first 'bias'"),
        (
            {"weight": torch.zeros(3, 2), "biass": torch.zeros(3)},
            r"not the model's, first 'biass' \(did you mean 'bias'\?\)",
        ),
        ({"weight": torch.zeros(3, 3), "bias": torch.zeros(3)}, "size mismatch for weight"),
        ([1, 2], "must hold a state dict, got list"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(
    nets: Path, tmp_path: Path, state: object, complaint: str
) -> None:
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InputError, match=complaint):
        load(f"{nets}:with_inputs", weights=tmp_path / "w.pt")


def test_weights_of_an_unknown_suffix_or_missing_are_an_error(nets: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"takes a state dict in a \.pt, \.pth or \.safetensors"):
        load(f"{nets}:with_inputs", weights=tmp_path / "w.onnx")
    with pytest.raises(InputError, match=r"w\.pt' does not exist"):
        load(f"{nets}:with_inputs", weights=tmp_path / "w.pt")


MAKER = """
from torch import nn


def make(size=2, *, bias=True):
    return nn.Linear(size, size, bias=bias)
"""


def test_a_callable_is_called_with_the_arguments_in_its_brackets(tmp_path):
    (tmp_path / "net.py").write_text(MAKER)
    loaded = load(f"{tmp_path}/net.py:make(3, bias=False)", ["1x3"])
    assert loaded.model.weight.shape == (3, 3)
    assert loaded.model.bias is None


@pytest.mark.parametrize("arguments", ["size=open('x')", "**{}", "1 +", "x", "f(1), (2", "1)(2"])
def test_an_argument_that_is_no_literal_is_not_run(tmp_path, arguments):
    (tmp_path / "net.py").write_text(MAKER)
    with pytest.raises(InputError, match="has arguments that cannot be read: expected numbers"):
        load(f"{tmp_path}/net.py:make({arguments})", ["1x3"])


def test_arguments_that_the_callable_does_not_take_are_one_sentence(tmp_path):
    (tmp_path / "net.py").write_text(MAKER)
    with pytest.raises(InputError, match="when called with these arguments, but it raised TypeErr"):
        load(f"{tmp_path}/net.py:make(width=1)", ["1x3"])


@pytest.fixture
def timm(monkeypatch):
    """What stands for timm, beside which transformers cannot be imported."""
    module = types.ModuleType("timm")
    module.__version__ = "1.0"
    module.is_model = lambda name: name == "tiny_net"
    module.list_models = lambda: ["tiny_net"]

    def create_model(name, **kwargs):
        net = torch.nn.Conv2d(3, kwargs.get("width", 2), 1)
        net.default_cfg = {"input_size": (3, 6, 6)}
        return net

    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)


def test_a_model_of_timm_needs_no_input(timm):
    loaded = load("timm:tiny_net.in1k(width=5)")
    assert loaded.example_inputs.shape == (1, 3, 6, 6)
    assert loaded.model.out_channels == 5
    assert not loaded.model.training


def test_a_model_of_timm_without_a_checkpoint_is_said_to_have_random_weights(timm, tmp_path):
    doubt = load("timm:tiny_net(width=5)").doubt
    assert "the weights of 'timm:tiny_net(width=5)' are random" in doubt
    assert "give 'timm:tiny_net(pretrained=True)', or --weights" in doubt
    assert load("timm:tiny_net(pretrained=True)").doubt is None
    torch.save(load("timm:tiny_net").model.state_dict(), tmp_path / "tiny.pt")
    assert load("timm:tiny_net", (), tmp_path / "tiny.pt").doubt is None


def test_a_model_that_timm_does_not_have_is_one_sentence_with_what_is_near(timm):
    with pytest.raises(InputError, match=r"timm 1.0 has no model 'tinynet' \(did you mean 'tiny_"):
        load("timm:tinynet")


def test_a_checkpoint_of_distributed_training_fits(tmp_path):
    (tmp_path / "net.py").write_text(MAKER)
    state = {f"module.{key}": value for key, value in nn.Linear(2, 2).state_dict().items()}
    torch.save(state, tmp_path / "ddp.pt")
    loaded = load(f"{tmp_path}/net.py:make", ["1x2"], tmp_path / "ddp.pt")
    assert torch.equal(loaded.model.weight, state["module.weight"])
