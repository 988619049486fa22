"""examples/recipe.py: the recipe runs, as it was written and with the lines that it lacked."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import torchfuse
from test_recipe import AS_IN_RECIPE, BEFORE
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.measuring import speed_benchmark
from torchfuse.targets.torchscript.scripting import op_counts

SCRIPT = (Path(__file__).parent.parent / "examples/recipe.py").read_text()
VERBATIM = re.sub(r".*# missing, \d.*\n", "", SCRIPT)
FILES = ["model.pt", "model_fused.pt", "model.ptl", "model_fused.ptl"]


@dataclass(frozen=True)
class Run:
    folder: Path
    printed: str
    warned: str

    def operators(self, name):
        with known_warnings_ignored():
            counts = op_counts(torch.jit.load(self.folder / name))
        return {kind for kind in counts if kind.startswith("quantized::")}


def run(script, folder):
    (folder / "recipe.py").write_text(script)
    ran = subprocess.run(
        [sys.executable, "recipe.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return Run(folder, ran.stdout, ran.stderr)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return run(SCRIPT, tmp_path_factory.mktemp("example"))


@pytest.fixture(
    scope="module", params=["torchfuse.fuse_modules", "torch.quantization.fuse_modules"]
)
def verbatim(request, tmp_path_factory):
    """The recipe without the lines that it lacked, and with either function that fuses."""
    script = VERBATIM.replace("torchfuse.fuse_modules", request.param)
    return run(script, tmp_path_factory.mktemp("verbatim"))


def test_the_lines_that_the_recipe_lacked_are_eval_calibration_and_the_conv():
    lacking = re.findall(r"(.*?)  # missing, (\d)", SCRIPT)
    assert sorted({number for _, number in lacking}) == ["1", "2", "3"]
    lines = {line.strip() for line, _ in lacking}
    assert lines == {
        "model.eval()",
        "model(torch.rand(8, 3, 224, 224))",
        'fusions = [["conv", "bn", "relu"]]',
    }


def test_both_models_are_printed_as_in_the_recipe(verbatim):
    assert verbatim.printed.startswith(BEFORE)
    assert AS_IN_RECIPE in verbatim.printed


@pytest.mark.parametrize("name", FILES)
def test_the_recipe_as_it_was_written_reaches_the_benchmark_of_every_file(verbatim, name, capsys):
    benchmark(verbatim.folder / name, capsys)


@pytest.mark.parametrize("name", FILES)
def test_with_the_lines_that_it_lacked_it_does_as_well(example, name, capsys):
    benchmark(example.folder / name, capsys)


def benchmark(path, capsys):
    words = [f"--model={path}", "--input_dims=1,3,224,224", "--input_type=float", "--iter=2"]
    assert speed_benchmark.main(words) == 0
    assert re.fullmatch(
        r"Starting benchmark.\nRunning warmup runs.\nMain runs.\n"
        r"Main run finished. Microseconds per iter: [\d.]+. Iters per second: [\d.]+\n",
        capsys.readouterr().out,
    )


def test_what_was_fused_is_one_operator(example, verbatim):
    assert verbatim.operators("model.pt") == {"quantized::conv2d", "quantized::batch_norm2d"}
    assert verbatim.operators("model_fused.pt") == {
        "quantized::conv2d",
        "quantized::batch_norm2d_relu",
    }
    assert example.operators("model_fused.pt") == {"quantized::conv2d_relu"}


def test_the_missing_calibration_is_told_twice_and_how_to_do_it(verbatim):
    told = re.findall(
        r"QuantizationWarning: The model was converted without data: .*", verbatim.warned
    )
    assert len(told) == 2
    assert all("between prepare and convert, call model.eval() and run the mod" in t for t in told)


def test_with_calibration_nothing_is_told_and_the_outputs_have_many_values(example):
    assert "QuantizationWarning" not in example.warned
    assert "FusionWarning" not in example.warned
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for name in FILES:
        assert len(torchfuse.load(example.folder / name)(x).unique()) > 50, name
