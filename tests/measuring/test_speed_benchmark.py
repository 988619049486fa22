"""speed_benchmark_torch to the letter.

The expected lines were seen in PyTorch's own binaries/speed_benchmark_torch.cc, compiled against
the wheel and run on the same models.
"""

import dataclasses
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchfuse.errors import ArtifactError, InputError, UnsupportedError
from torchfuse.measuring.speed_benchmark import FLAGS, Options, create_inputs, main, run

Files = Callable[[str], str]

OPENING = "Starting benchmark.\nRunning warmup runs.\nMain runs.\n"


def ticking(*times_ns: int) -> Callable[[], int]:
    """A clock for one run: its iterations take these times, and nothing else takes any."""
    readings = [0]
    for time_ns in times_ns:
        readings += [readings[-1], readings[-1] + time_ns]
    return iter([*readings, readings[-1]]).__next__


def lines(options: Options, *times_ns: int) -> str:
    out = io.StringIO()
    run(dataclasses.replace(options, iter=len(times_ns)), out, ticking(*times_ns))
    return out.getvalue()


def test_the_flags_have_the_defaults_of_the_tool() -> None:
    assert {flag.name: flag.default for flag in FLAGS} == {
        "model": "",
        "input_dims": "",
        "input_type": "",
        "input_memory_format": "contiguous_format",
        "no_inputs": False,
        "use_caching_allocator": False,
        "use_bundled_input": -1,
        "print_output": False,
        "warmup": 0,
        "iter": 10,
        "report_pep": False,
        "pytext_len": 0,
        "vulkan": False,
    }
    assert dataclasses.asdict(Options()) == {flag.name: flag.default for flag in FLAGS}


@pytest.mark.parametrize("name", ["third.pt", "third.ptl", "third.pte"])
def test_a_run_prints_the_lines_of_the_tool(model_files: Files, name: str) -> None:
    options = Options(model=model_files(name), input_dims="1,3,4,4", input_type="float", warmup=2)
    assert lines(options, 121_000_000, 121_636_000) == OPENING + (
        "Main run finished. Microseconds per iter: 121318. Iters per second: 8.2428\n"
    )


@pytest.mark.parametrize(
    ("times_ns", "per_iteration", "per_second"),
    [
        ([30_761, 30_763], "30.762", "32507.6"),
        ([1_234_567_890], "1.23457e+06", "0.81"),
        ([999_999_400], "999999", "1"),
        ([999_999_700], "1e+06", "1"),
        ([1_000], "1", "1e+06"),
        ([100], "0.1", "1e+07"),
        ([123_456_789_012], "1.23457e+08", "0.0081"),
        ([16_777_217_000, 0, 0], "5.59241e+06", "0.178814"),
    ],
)
def test_figures_have_six_significant_digits(
    model_files: Files, times_ns: list[int], per_iteration: str, per_second: str
) -> None:
    options = Options(model=model_files("constant.pt"), no_inputs=True)
    assert lines(options, *times_ns).splitlines()[-1] == (
        f"Main run finished. Microseconds per iter: {per_iteration}. Iters per second: {per_second}"
    )


def test_no_iterations_take_infinitely_long_each(model_files: Files) -> None:
    options = Options(model=model_files("constant.pt"), no_inputs=True, iter=0)
    out = io.StringIO()
    assert run(options, out, iter([0, 42]).__next__) == ()
    assert out.getvalue() == OPENING + (
        "Main run finished. Microseconds per iter: inf. Iters per second: 0\n"
    )


def test_report_pep_prints_whole_microseconds_of_every_iteration(model_files: Files) -> None:
    options = Options(model=model_files("constant.pt"), no_inputs=True, report_pep=True)
    observer = 'PyTorchObserver {"type": "NET", "unit": "us", "metric": "latency", "value": "%s"}\n'
    assert lines(options, 599_746_999, 1_234_567_890, 999) == (
        OPENING
        + observer % "599746"
        + observer % "1.23457e+06"
        + observer % "0"
        + "Main run finished. Microseconds per iter: 611439. Iters per second: 1.63549\n"
    )


@pytest.mark.parametrize(
    ("name", "flags", "printed"),
    [
        (
            "third.pt",
            {"input_dims": "2,3", "input_type": "float"},
            " 0.3333  0.3333  0.3333\n 0.3333  0.3333  0.3333\n[ CPUFloatType{2,3} ]\n",
        ),
        (
            "third.ptl",
            {"input_dims": "3", "input_type": "uint8_t"},
            " 0.3333\n 0.3333\n 0.3333\n[ CPUFloatType{3} ]\n",
        ),
        ("constant.pt", {"no_inputs": True}, " 0\n 1\n 2\n[ CPULongType{3} ]\n"),
        (
            "sum.pt",
            {"input_dims": "2,3", "input_type": "float", "pytext_len": 3},
            "9\n[ CPUFloatType{} ]\n",
        ),
        (
            "bundled.pt",
            {"use_bundled_input": 1},
            " 0.6667  0.6667\n[ CPUFloatType{1,2} ]\n",
        ),
        (
            "bundled.ptl",
            {"use_bundled_input": 0},
            " 0.3333  0.3333  0.3333\n 0.3333  0.3333  0.3333\n[ CPUFloatType{2,3} ]\n",
        ),
    ],
)
def test_print_output_prints_first_and_as_c_plus_plus_does(
    model_files: Files, name: str, flags: dict[str, object], printed: str
) -> None:
    options = Options(model=model_files(name), print_output=True, **flags)  # type: ignore[arg-type]
    assert lines(options, 1_000).startswith(printed + OPENING)


def test_warm_up_runs_are_run_and_not_timed(
    model_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.Tensor] = []
    monkeypatch.setattr("torchfuse.exporting.model_files.load", lambda _path: calls.append)
    samples_s = run(
        Options(model="m.pt", input_dims="1", input_type="float", warmup=4, iter=3),
        io.StringIO(),
        ticking(1_000, 2_000, 3_000),
    )
    assert len(calls) == 7
    assert samples_s == (1e-6, 2e-6, 3e-6)


def test_models_run_in_inference_mode_and_unoptimized_as_in_the_tool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[bool, bool]] = []

    def model() -> None:
        seen.append((torch.is_inference_mode_enabled(), torch._C._get_graph_executor_optimize()))

    monkeypatch.setattr("torchfuse.exporting.model_files.load", lambda _path: model)
    run(Options(model="m.pt", no_inputs=True, iter=1), io.StringIO())
    assert seen == [(True, False)]


def test_inputs_are_ones_of_the_given_shapes_types_and_formats() -> None:
    first, second, third, length = create_inputs(
        Options(
            input_dims="1,3,4,5;2;7",
            input_type="float;uint8_t;int64",
            input_memory_format="channels_last;contiguous_format;contiguous_format",
            pytext_len=6,
        )
    )
    assert torch.equal(first, torch.ones(1, 3, 4, 5))
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(second, torch.ones(2, dtype=torch.uint8))
    assert second.dtype is torch.uint8
    assert third.dtype is torch.int64
    assert torch.equal(length, torch.tensor([6]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"input_dims": "1,3,2000000,2000000", "input_type": "float"},
            r"^Input dims 1,3,2000000,2000000 cannot be allocated: .*; give smaller ones",
        ),
        ({"input_dims": "1"}, r"^Input dims and type should have the same number of items\. \(1 v"),
        ({"input_type": "float"}, r"Input dims and type should have the same .* \(0 vs 1\)"),
        ({}, r"^Input dims and format should have the same number of items\. \(0 vs 1\)$"),
        (
            {"input_dims": "1;2", "input_type": "float;float"},
            r"^Input dims and format should have the same number of items\. \(2 vs 1\)$",
        ),
        ({"input_dims": "1", "input_type": "double"}, r"^Unsupported input type: double \(it is "),
        (
            {"input_dims": "1", "input_type": "float", "input_memory_format": "nhwc"},
            r"^Unsupported input memory format: nhwc \(it is one of contiguous_format, channels_l",
        ),
        (
            {"input_dims": "1,2", "input_type": "float", "input_memory_format": "channels_last"},
            r"^channels_last memory format only available on 4D tensors!$",
        ),
        ({"input_dims": "1,x", "input_type": "float"}, r"^Input dims should be numbers .* 1,x\.$"),
        ({"input_dims": "1,-2", "input_type": "float"}, r"^Input dims should be numbers .*-2\.$"),
    ],
)
def test_inputs_that_cannot_be_made_are_refused_in_the_words_of_the_tool(
    flags: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        create_inputs(Options(**flags))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "printed", "message"),
    [
        (
            {"warmup": -3},
            "Starting benchmark.\nRunning warmup runs.\n",
            r"^Number of warm up runs should be non negative, provided -3\.$",
        ),
        (
            {"iter": -1},
            OPENING,
            r"^Number of main runs should be non negative, provided -1\.$",
        ),
    ],
)
def test_negative_counts_are_refused_where_the_tool_refuses_them(
    model_files: Files, flags: dict[str, int], printed: str, message: str
) -> None:
    out = io.StringIO()
    options = Options(model=model_files("constant.pt"), no_inputs=True, **flags)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        run(options, out)
    assert out.getvalue() == printed


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("bundled.pt", {"use_bundled_input": 2}, r"^Model has only 2 bundled inputs\.$"),
        (
            "third.pt",
            {"use_bundled_input": 0},
            r"^Model does not have bundled inputs\.  Before saving, "
            r"use torch\.utils\.bundled_inputs\.augment_model_with_bundled_inputs\.$",
        ),
        ("third.ptl", {"use_bundled_input": 0}, r"^Model does not have bundled inputs\."),
        ("third.pte", {"use_bundled_input": 0}, r"^Model does not have bundled inputs\."),
        (
            "fixed.pt",
            {"input_dims": "2,3", "input_type": "float"},
            r"fixed\.pt' cannot run on these inputs: RuntimeError: The size of tensor a \(3\).*;",
        ),
        (
            "third.pt",
            {"no_inputs": True},
            r"third\.pt' cannot run on these inputs: forward\(\) is missing value for argument",
        ),
        (
            "third.pte",
            {"input_dims": "1,3,9,9", "input_type": "float"},
            r"1×3×4×4 float32.* got 1×3×9×9 float32",
        ),
    ],
)
def test_a_model_and_inputs_that_do_not_fit_are_one_sentence(
    model_files: Files, name: str, flags: dict[str, object], message: str
) -> None:
    options = Options(model=model_files(name), **flags)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        run(options, io.StringIO())


def test_vulkan_is_refused_since_no_build_here_has_it() -> None:
    with pytest.raises(UnsupportedError, match="has no Vulkan; leave the flag out"):
        run(Options(vulkan=True), io.StringIO())


def test_the_caching_allocator_is_taken(model_files: Files) -> None:
    options = Options(model=model_files("constant.pt"), no_inputs=True, use_caching_allocator=True)
    assert lines(options, 1_000).startswith(OPENING)


def test_a_missing_file_is_an_error_and_so_is_no_file(tmp_path: Path) -> None:
    flags = {"input_dims": "1", "input_type": "float"}
    with pytest.raises(ArtifactError, match=r"'.*none\.pt' does not exist"):
        run(Options(model=str(tmp_path / "none.pt"), **flags), io.StringIO())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="The model is missing"):
        run(Options(**flags), io.StringIO())  # type: ignore[arg-type]


def test_the_command_prints_results_to_stdout_and_ends_with_zero(
    model_files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["--model", model_files("constant.pt"), "--no_inputs=true", "--iter", "2"])
    printed, errors = capsys.readouterr()
    assert (status, errors) == (0, "")
    assert re.fullmatch(
        re.escape(OPENING) + r"Main run finished\. Microseconds per iter: [0-9.e+]+\. "
        r"Iters per second: [0-9.e+]+\n",
        printed,
    )


def test_an_unknown_flag_ends_with_one_and_the_sentence_of_the_tool(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--bogus=1"]) == 1
    assert capsys.readouterr() == (
        "",
        "Parsing commandline arguments for c10.\n"
        "C10 flag: unrecognized commandline argument: --bogus=1\n"
        "Failed to parse command line flags!\n",
    )


def test_an_error_ends_with_one_and_its_sentence_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--input_dims=1"]) == 1
    assert capsys.readouterr() == (
        "",
        "Input dims and type should have the same number of items. (1 vs 0)\n",
    )


HELP = """\
Run speed benchmark for pytorch model.
Example usage:
./speed_benchmark_torch --model=<model_file> --use_bundled_input=0 --warmup=5 --iter=20
Arguments: 
    model: (std::string, default "") The given torch script model to benchmark.
    input_dims: (std::string, default "") Alternate to input_files, if all inputs are simple \
float TensorCPUs, specify the dimension using comma separated numbers. If multiple input needed, \
use semicolon to separate the dimension of different tensors.
    input_type: (std::string, default "") Input type (uint8_t/float)
    input_memory_format: (std::string, default "contiguous_format") Input memory format \
(contiguous_format/channels_last)
    no_inputs: (bool, default false) Whether the model has any input. Will ignore other input \
arguments if true
    use_caching_allocator: (bool, default false) Whether to cache allocations between inference \
iterations
    use_bundled_input: (int, default -1) If set, benchmark will expect the model to have bundled \
inputs and will run on the input with this index. \n\
    print_output: (bool, default false) Whether to print output with all one input tensor.
    warmup: (int, default 0) The number of iterations to warm up.
    iter: (int, default 10) The number of iterations to run.
    report_pep: (bool, default false) Whether to print performance stats for AI-PEP.
    pytext_len: (int, default 0) Length of input sequence.
    vulkan: (bool, default false) Whether to use Vulkan backend (GPU).
"""  # noqa: W291  # c10 leaves these spaces


@pytest.mark.parametrize("flag", ["--input=1x3x4x4", "--json=out.json", "--threads=1"])
def test_the_flags_of_bench_are_none_of_the_tools(
    model_files: Files, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert main([f"--model={model_files('third.pt')}", flag]) == 1
    assert f"unrecognized commandline argument: {flag}\n" in capsys.readouterr().err


def test_help_is_what_c10_prints_and_needs_no_torch() -> None:
    program = (
        "import sys; from torchfuse.measuring.speed_benchmark import main\n"
        "status = main(['--help'])\n"
        "sys.exit(status or 2 * ('torch' in sys.modules))"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout == HELP


def test_the_command_runs_in_a_process_of_its_own(model_files: Files) -> None:
    program = "import sys; from torchfuse.measuring.speed_benchmark import main; sys.exit(main())"
    flags = ["--input_dims=1,3,4,4", "--input_type=float", "--report_pep=1", "--iter=2"]
    child = subprocess.run(
        [sys.executable, "-c", program, f"--model={model_files('third.pte')}", *flags],
        capture_output=True,
        text=True,
    )
    assert (child.returncode, child.stderr) == (0, "")
    assert [line.split(" ")[0] for line in child.stdout.splitlines()] == [
        "Starting",
        "Running",
        "Main",
        "PyTorchObserver",
        "PyTorchObserver",
        "Main",
    ]
