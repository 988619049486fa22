"""PyTorch's speed_benchmark_torch to the letter, for `.pt`, `.ptl` and `.pte` on this machine.

Flags, defaults and every line on stdout are those of binaries/speed_benchmark_torch.cc, as it was
when the "Fuse Modules" recipe used it. Three things differ, all of them in failing:

- where the C++ program aborts with a stack trace, this ends with the same sentence on one line
  and status 1;
- `--vulkan` is refused, since this build of torch has no Vulkan;
- only the tool's own flags exist, not those that the libraries inside it register besides.

`--use_caching_allocator` is taken and has no effect, as in any build that is not for a phone.
"""

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from torchfuse.errors import InputError, TorchfuseError, UnsupportedError, first_line
from torchfuse.measuring.c10_flags import Flag, FlagError, HelpRequest, help_text, read_flags

if TYPE_CHECKING:
    import torch

__all__ = [
    "FLAGS",
    "Options",
    "bundled_input",
    "create_inputs",
    "main",
    "model_errors_in_one_line",
    "observer_line",
    "print_value",
    "run",
]

FLAGS = (
    Flag("model", "", "The given torch script model to benchmark."),
    Flag(
        "input_dims",
        "",
        "Alternate to input_files, if all inputs are simple float TensorCPUs, specify the "
        "dimension using comma separated numbers. If multiple input needed, use semicolon to "
        "separate the dimension of different tensors.",
    ),
    Flag("input_type", "", "Input type (uint8_t/float)"),
    Flag(
        "input_memory_format",
        "contiguous_format",
        "Input memory format (contiguous_format/channels_last)",
    ),
    Flag(
        "no_inputs",
        False,
        "Whether the model has any input. Will ignore other input arguments if true",
    ),
    Flag(
        "use_caching_allocator",
        False,
        "Whether to cache allocations between inference iterations",
    ),
    Flag(
        "use_bundled_input",
        -1,
        "If set, benchmark will expect the model to have bundled inputs and will run on the input "
        "with this index. ",
    ),
    Flag("print_output", False, "Whether to print output with all one input tensor."),
    Flag("warmup", 0, "The number of iterations to warm up."),
    Flag("iter", 10, "The number of iterations to run."),
    Flag("report_pep", False, "Whether to print performance stats for AI-PEP."),
    Flag("pytext_len", 0, "Length of input sequence."),
    Flag("vulkan", False, "Whether to use Vulkan backend (GPU)."),
)

_USAGE = (
    "Run speed benchmark for pytorch model.\n"
    "Example usage:\n"
    "./speed_benchmark_torch --model=<model_file> --use_bundled_input=0 --warmup=5 --iter=20"
)

ClockNs = Callable[[], int]  # nanoseconds since any fixed moment


@dataclass(frozen=True)
class Options:
    """The value of each flag; see `FLAGS`."""

    model: str = ""
    input_dims: str = ""
    input_type: str = ""
    input_memory_format: str = "contiguous_format"
    no_inputs: bool = False
    use_caching_allocator: bool = False
    use_bundled_input: int = -1
    print_output: bool = False
    warmup: int = 0
    iter: int = 10
    report_pep: bool = False
    pytext_len: int = 0
    vulkan: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `speed_benchmark_torch`; return its exit status."""
    try:
        values = read_flags(FLAGS, sys.argv[1:] if arguments is None else arguments)
    except HelpRequest:
        sys.stdout.write(help_text(_USAGE, FLAGS))
        return 0
    except FlagError as error:
        sys.stderr.write(f"{error}Failed to parse command line flags!\n")
        return 1
    options = Options(**values)  # type: ignore[arg-type]  # read_flags gives each its own type
    try:
        run(options)
    except TorchfuseError as error:
        sys.stdout.flush()
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def run(
    options: Options, out: TextIO | None = None, clock_ns: ClockNs = time.perf_counter_ns
) -> tuple[float, ...]:
    """Print the tool's lines to `out` (stdout) and return the time of each iteration in seconds.

    Raises:
        InputError: flags that contradict each other, or inputs that the model does not take.
        ArtifactError: the file is missing, damaged or of an unknown kind.
        UnsupportedError: Vulkan was asked for.
    """
    out = sys.stdout if out is None else out
    if options.vulkan:
        raise UnsupportedError(
            "Expected a backend of this build, got --vulkan=true: this build of torch has no "
            "Vulkan; leave the flag out to run on the processor."
        )
    inputs = create_inputs(options)
    import torch

    from torchfuse.exporting.model_files import load

    if not options.model:
        raise InputError("The model is missing; name its file: --model=<model_file>.")
    with (
        model_errors_in_one_line(options.model),
        torch.inference_mode(),
        torch.jit.optimized_execution(False),  # type: ignore[attr-defined]  # public, says its docstring
    ):
        model = load(options.model)
        if isinstance(model, torch.jit.ScriptModule):
            model.eval()
        if options.use_bundled_input >= 0:
            inputs = bundled_input(model, options.use_bundled_input)
        if options.print_output:
            print_value(model(*inputs), out)
        _say(out, "Starting benchmark.")
        _say(out, "Running warmup runs.")
        if options.warmup < 0:
            raise InputError(
                f"Number of warm up runs should be non negative, provided {options.warmup}."
            )
        for _ in range(options.warmup):
            model(*inputs)
        _say(out, "Main runs.")
        if options.iter < 0:
            raise InputError(
                f"Number of main runs should be non negative, provided {options.iter}."
            )
        times_ns = []
        started_ns = clock_ns()
        for _ in range(options.iter):
            start_ns = clock_ns()
            model(*inputs)
            times_ns.append(clock_ns() - start_ns)
        elapsed_ns = clock_ns() - started_ns
    if options.report_pep:
        for time_ns in times_ns:
            _say(out, observer_line(time_ns))
    _say(out, _closing_line(elapsed_ns, options.iter))
    return tuple(time_ns / 1e9 for time_ns in times_ns)


def create_inputs(options: Options) -> "tuple[torch.Tensor, ...]":
    """Return a tensor of ones for each entry of `--input_dims`, and `{n}` for `--pytext_len=n`.

    Raises:
        InputError: unequal numbers of dims, types and formats, or one that does not exist.
    """
    if options.no_inputs or options.use_bundled_input >= 0:
        return ()
    dims_list = _split(";", options.input_dims)
    types = _split(";", options.input_type)
    formats = _split(";", options.input_memory_format)
    for what, entries in (("type", types), ("format", formats)):
        if len(dims_list) != len(entries):
            raise InputError(
                f"Input dims and {what} should have the same number of items. "
                f"({len(dims_list)} vs {len(entries)})"
            )
    inputs = [_ones(*entry) for entry in zip(dims_list, types, formats, strict=True)]
    if options.pytext_len > 0:
        import torch

        inputs.append(torch.full((1,), options.pytext_len, dtype=torch.int64))
    return tuple(inputs)


def _split(separator: str, text: str) -> list[str]:
    return [piece for piece in text.split(separator) if piece]


def _ones(dims_text: str, type_name: str, format_name: str) -> "torch.Tensor":
    import torch

    # As std::stoi, which reads a number as far as it is one.
    numbers = [re.match(r"\s*([+-]?[0-9]+)", piece) for piece in _split(",", dims_text)]
    dims = [int(number[1]) if number else -1 for number in numbers]
    if any(not 0 <= dim < 2**31 for dim in dims):
        raise InputError(
            f"Input dims should be numbers separated by commas, such as 1,3,224,224, provided "
            f"{dims_text}."
        )
    dtypes = {"float": torch.float32, "uint8_t": torch.uint8, "int64": torch.int64}
    if type_name not in dtypes:
        raise InputError(f"Unsupported input type: {type_name} (it is one of {', '.join(dtypes)})")
    if format_name == "channels_last" and len(dims) != 4:
        raise InputError("channels_last memory format only available on 4D tensors!")
    memory_formats = {
        "contiguous_format": torch.contiguous_format,
        "channels_last": torch.channels_last,
    }
    if format_name not in memory_formats:
        raise InputError(
            f"Unsupported input memory format: {format_name} "
            f"(it is one of {', '.join(memory_formats)})"
        )
    try:
        ones = torch.ones(dims, dtype=dtypes[type_name])
    except RuntimeError as error:
        raise InputError(
            f"Input dims {dims_text} cannot be allocated: {first_line(error)}; give smaller ones."
        ) from error
    return ones.contiguous(memory_format=memory_formats[format_name])


def bundled_input(model: Callable[..., Any], index: int) -> tuple[Any, ...]:
    """Return the input that was saved with the model under this index.

    Raises:
        InputError: the model has none, or fewer.
    """
    bundled: Sequence[tuple[Any, ...]]
    if hasattr(model, "get_all_bundled_inputs"):
        bundled = model.get_all_bundled_inputs()
    elif hasattr(model, "find_method") and model.find_method("get_all_bundled_inputs"):
        bundled = model.run_method("get_all_bundled_inputs")  # type: ignore[attr-defined]  # lite
    else:
        raise InputError(
            "Model does not have bundled inputs.  Before saving, "
            "use torch.utils.bundled_inputs.augment_model_with_bundled_inputs."
        )
    if index >= len(bundled):
        raise InputError(f"Model has only {len(bundled)} bundled inputs.")
    return tuple(bundled[index])


@contextlib.contextmanager
def model_errors_in_one_line(path: str) -> Iterator[None]:
    """Turn what a model raises on inputs it does not take into an InputError of one line."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        # TorchScript's own first line says only that something failed, and its last one what.
        in_script = bool(lines) and lines[0].startswith("The following operation failed")
        reason = (lines[-1] if in_script else lines[0]) if lines else type(error).__name__
        raise InputError(
            f"The model in '{path}' cannot run on these inputs: {reason.strip()}; "
            "give it the shapes and types it was made for."
        ) from error


def print_value(value: Any, out: TextIO) -> None:
    """Print what a model returned as C++ prints it."""
    import torch

    from torchfuse.isolation.warning_filters import known_warnings_ignored

    # TorchScript's print is the C++ one, and writes to whatever sys.stdout is.
    with known_warnings_ignored(), contextlib.redirect_stdout(out):
        torch.jit.CompilationUnit("def show(value: Any):\n    print(value)\n").show(value)
    out.flush()


def _say(out: TextIO, line: str) -> None:
    out.write(f"{line}\n")
    out.flush()  # std::endl does


def observer_line(time_ns: int) -> str:
    """Return the line of `--report_pep` for one iteration."""
    # whole microseconds, in a float
    value = _g6(np.float32(time_ns // 1000))
    return (
        f'PyTorchObserver {{"type": "NET", "unit": "us", "metric": "latency", "value": "{value}"}}'
    )


def _closing_line(elapsed_ns: int, iterations: int) -> str:
    # In the C++ types: the timer and the time per iteration are floats, the rate is a double.
    micros = np.float32(elapsed_ns) / np.float32(1000)
    with np.errstate(divide="ignore", invalid="ignore"):
        per_iteration = micros / np.float32(iterations)
        per_second = np.float64(1000.0 * 1000 * iterations) / np.float64(micros)
    return (
        f"Main run finished. Microseconds per iter: {_g6(per_iteration)}. "
        f"Iters per second: {_g6(per_second)}"
    )


def _g6(value: np.floating[Any]) -> str:
    # How C++ streams print a float or double unless told otherwise.
    return f"{float(value):.6g}"
