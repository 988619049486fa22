"""The command `torchfuse bench`: how fast model files run, on this machine and on devices."""

import contextlib
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchfuse.commands.bench_inputs import Inputs, described_inputs, inputs_asked_for, shown
from torchfuse.commands.bench_meanwhile import Progress, Report
from torchfuse.commands.interruption import saving_what_there_is
from torchfuse.commands.model_options import input_option
from torchfuse.commands.status import NOISE
from torchfuse.errors import DeviceError, InputError, UnsupportedError
from torchfuse.measuring.speed_benchmark import FLAGS, Options
from torchfuse.render.progress import quiet_option
from torchfuse.units import decibels

if TYPE_CHECKING:
    from torchfuse.devices.run import DeviceRun
    from torchfuse.measuring.tasks import Task
    from torchfuse.operator_times import Profile

_RUNS = 50
_TIMEOUT_S = 600.0
_LONGEST_TIMEOUT_S = 86400.0  # what a device's `sleep` surely takes


def _same_flags_as_the_tool(function: Callable[..., None]) -> Callable[..., None]:
    for flag in reversed(FLAGS):
        is_bool = isinstance(flag.default, bool)
        function = click.option(
            f"--{flag.name}",
            type=type(flag.default),
            metavar="true|false" if is_bool else None,
            help=flag.help,
        )(function)
    return function


def _a_file(name: str, what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(f"--{name}", f"{name}_path", metavar="FILE", help=what)


@click.command("bench", short_help="How fast model files run, here and on devices.")
@click.argument("artifacts", nargs=-1, metavar="[ARTIFACT]...")
@input_option("An input, in place of what the files say: ones")
@_same_flags_as_the_tool
@click.option("--threads", type=int, help="Threads that the models run on.")
@click.option(
    "--device", "devices", multiple=True, metavar="NAME",
    help="local, adb, adb:SERIAL or ssh:HOST; repeatable. Default: local.",
)  # fmt: skip
@click.option(
    "--runner", type=click.Path(path_type=Path), metavar="PATH",
    help="Your own executor_runner (.pte) or speed_benchmark_torch (.pt, .ptl) for the device.",
)  # fmt: skip
@click.option(
    "--device-python", default="python3", metavar="PATH", show_default=True,
    help="The Python there, where no --runner is given.",
)  # fmt: skip
@click.option(
    "--device-folder", metavar="FOLDER",
    help="Where the private folder there is made. Default: its folder for temporary files.",
)  # fmt: skip
@click.option(
    "--timeout", type=float, default=_TIMEOUT_S, metavar="SECONDS", show_default=True,
    help="How long all runs on a device may take; they are ended there then.",
)  # fmt: skip
@_a_file("json", "Save every sample, ratio and fact there, after every round; '-' prints it.")
@_a_file("csv", "Save a row a measurement there; '-' prints them.")
@_a_file("markdown", "Save a table a device there; '-' prints it.")
@quiet_option
@click.option("--resume", is_flag=True, help="Go on with the run that --json holds.")
@click.option(
    "--fail-on-noise", is_flag=True,
    help="End with status 3 where the figures cannot be trusted, for CI.",
)  # fmt: skip
@click.option(
    "--profile", is_flag=True,
    help="Show the ten most expensive operators side by side: here, and on a device by an "
    "executor_runner with ExecuTorch's event tracer.",
)  # fmt: skip
@click.option(
    "--etdump", "etdumps", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
    help="Show an ETDump that such a runner wrote; repeat for two side by side.",
)  # fmt: skip
@click.option(
    "--read", "record", type=click.Path(path_type=Path), metavar="FILE",
    help="Compare what `python3 -m torchfuse.runner --save FILE` measured elsewhere.",
)  # fmt: skip
def command(
    artifacts: tuple[str, ...],
    inputs: tuple[str, ...],
    threads: int | None,
    devices: tuple[str, ...],
    runner: Path | None,
    device_python: str,
    device_folder: str | None,
    timeout: float,
    json_path: str | None,
    csv_path: str | None,
    markdown_path: str | None,
    resume: bool,
    fail_on_noise: bool,
    record: Path | None,
    profile: bool,
    etdumps: tuple[Path, ...],
    **flags: Any,
) -> None:
    """Measure how long one call of each ARTIFACT takes: any file of 'torchfuse targets'.

    \b
      torchfuse bench plain.pt fused.pt model.pte
      torchfuse bench model.pte --input 1x3x224x224 --device adb --runner executor_runner
      torchfuse bench model.pte --device ssh:pi@raspberrypi

    Each artifact has a process of its own; they have turns in rounds in random order, on one
    thread, after a warm-up until the times have settled; 50 runs unless --iter says otherwise. The
    inputs are tensors of ones, of the sizes and types that the files were exported for; --input
    says others, and says it where a file does not. On another device the outputs are compared with
    this machine's before anything is timed.

    \b
      torchfuse bench --model=model.pte --input_dims=1,3,224,224 --input_type=float

    With --model instead, this is PyTorch's speed_benchmark_torch: its flags, its defaults
    (--warmup=0, --iter=10, threads as they are) and its output.
    """  # noqa: D301  # \b keeps click from re-filling the next paragraph
    given = {name: value for name, value in flags.items() if value is not None}
    ways = [name for name, is_given in (
        ("ARTIFACT names", bool(artifacts)), ("--model", "model" in given),
        ("--read", record is not None), ("--etdump", bool(etdumps)),
    ) if is_given]  # fmt: skip
    if len(ways) != 1:
        raise InputError(
            "Expected ARTIFACT names, --model, --read or --etdump, got "
            f"{' and '.join(ways) or 'none of them'}; 'torchfuse bench --help' shows each."
        )
    if etdumps:
        _show_etdumps(etdumps)
        return
    report = Report({"json": json_path, "csv": csv_path, "markdown": markdown_path})
    if record is not None:
        _compare_record(record, report, fail_on_noise)
    elif artifacts:
        if given.get("vulkan"):
            # The tool's own sentence is about its flag; here a device would be the way to a GPU.
            raise InputError("This machine's runtimes have no Vulkan; leave out --vulkan.")
        wanted = inputs_asked_for(inputs, given)
        settings = _settings(given, threads, runner, device_python, timeout, profile)
        _require_profiles(artifacts, devices, settings)
        runs = _measure(
            artifacts,
            wanted,
            settings,
            devices or ("local",),
            device_folder,
            report,
            resume,
            print_output=bool(given.get("print_output")),
        )
        _show(runs, report, observer=bool(given.get("report_pep")))
        _end(runs, fail_on_noise)
    else:
        for name, value in (
            ("--input", inputs), ("--device", devices), ("--runner", runner),
            ("--resume", resume), ("--fail-on-noise", fail_on_noise),
        ):  # fmt: skip
            if value:
                raise InputError(
                    f"{name} goes with ARTIFACT names, and --model is the tool on this machine; "
                    "give the file's name without --model."
                )
        _as_the_tool(Options(**given), threads, report)


def _as_the_tool(options: Options, threads: int | None, report: Report) -> None:
    import torch

    from torchfuse.devices.facts import DeviceFacts
    from torchfuse.devices.run import DeviceRun
    from torchfuse.measuring import speed_benchmark
    from torchfuse.measuring.timing import Measurement, pinned_threads

    report.open({"inputs": options.input_dims})
    with contextlib.nullcontext() if threads is None else pinned_threads(threads):
        samples_s = speed_benchmark.run(options, sys.stderr if report.printed else sys.stdout)
        count = torch.get_num_threads()
    measured = Measurement(options.model, samples_s, options.warmup, None, count)
    report.take(DeviceRun(DeviceFacts("local", "ready"), "speed_benchmark_torch", (measured,)))
    report.save()
    report.print()


def _settings(
    given: Mapping[str, Any],
    threads: int | None,
    runner: Path | None,
    python: str,
    timeout_s: float,
    profile: bool,
) -> Any:
    from torchfuse.devices.benching import Settings

    if not 0 < timeout_s <= _LONGEST_TIMEOUT_S:
        raise InputError(
            f"--timeout must be more than 0 seconds and at most {_LONGEST_TIMEOUT_S:g}, got "
            f"{timeout_s:g}."
        )
    if runner is not None and not runner.is_file():
        raise InputError(
            f"Expected a runner, but '{runner}' is no file; docs/devices.md says how to get one."
        )
    return Settings(
        runs=given.get("iter", _RUNS),
        warmup=given.get("warmup"),
        threads=1 if threads is None else threads,
        timeout_s=timeout_s,
        runner=runner,
        python=python,
        profile=profile,
    )


def _require_profiles(artifacts: Sequence[str], devices: Sequence[str], settings: Any) -> None:
    """Raise, before anything is measured, if what was asked for cannot be had.

    Raises:
        UnsupportedError: a runtime that keeps no profile.
    """
    if not settings.profile or settings.runner is not None:
        return
    from torchfuse.targets import TARGETS, target_for

    obstacles = {name: target_for(name).profile_obstacle() for name in artifacts}
    if {*devices} - {"local"}:
        what, why = (
            "a model on a device",
            (
                "a runtime there keeps one only if it was built to. Build executor_runner with "
                "-DEXECUTORCH_BUILD_DEVTOOLS=ON -DEXECUTORCH_ENABLE_EVENT_TRACER=ON, and give it "
                "with --runner, or give the ETDump that it writes with --etdump"
            ),
        )
    elif without := [name for name, obstacle in obstacles.items() if obstacle is not None]:
        what, why = f"'{without[0]}'", str(obstacles[without[0]])
    else:
        return
    profiled = [t.suffix for t in TARGETS if t.profile_obstacle() is None]
    raise UnsupportedError(
        f"Expected {' or '.join(profiled)} files on this machine for --profile, got {what}: {why}."
    )


def _show_etdumps(paths: Sequence[Path]) -> None:
    from torchfuse.targets.executorch.etdump import profile_of_etdump

    _show_profiles([profile_of_etdump(path) for path in paths])


def _show_profiles(profiles: "Sequence[Profile]") -> None:
    from rich.console import Console

    from torchfuse.render.profile import table

    Console().print(table(profiles))


def _measure(
    artifacts: Sequence[str],
    wanted: Inputs,
    settings: Any,
    devices: Sequence[str],
    folder: str | None,
    report: Report,
    resume: bool,
    *,
    print_output: bool,
) -> "list[DeviceRun]":
    from torchfuse.devices.named import checked_device
    from torchfuse.devices.several import bench_devices
    from torchfuse.measuring.timing import check_counts
    from torchfuse.temporary import temporary_folder

    devices = list(dict.fromkeys(map(checked_device, devices)))
    paths = _distinct(artifacts)
    check_counts(settings.runs, settings.threads, settings.warmup, paths)
    with temporary_folder() as inputs:
        tasks = {name: _task(path, wanted, Path(inputs)) for name, path in paths.items()}
        described = {
            **described_inputs(wanted, tasks),
            "runs": settings.runs,
            "warmup": settings.warmup,
            "threads": settings.threads,
            "runner": None if settings.runner is None else _digest(settings.runner),
            "files": {name: task.sha256 for name, task in tasks.items()},
        }
        if print_output:
            _print_outputs(tasks)
        if wanted.in_files:
            case = next(iter(tasks.values())).case
            click.echo(f"Inputs, as the files say: {shown(case)} (--input: others).", err=True)
        earlier = report.open(described, resume=resume)
        with saving_what_there_is(report.save, report.json_path), Progress() as progress:
            runs = bench_devices(
                tasks,
                devices,
                settings,
                folder=folder,
                earlier=earlier,
                on_step=progress.show,
                on_partial=report.take,
            )
    for run in runs:
        report.take(run)
    report.save()
    return runs


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _task(path: str, wanted: Inputs, folder: Path) -> "Task":
    from torchfuse.measuring.speed_benchmark import model_errors_in_one_line
    from torchfuse.measuring.tasks import task_of

    with model_errors_in_one_line(path):
        task = task_of(path, wanted.case_for(path), folder)
    _refuse_nan(path, task)
    return task


def _print_outputs(tasks: "Mapping[str, Task]") -> None:
    from torchfuse.measuring.speed_benchmark import print_value

    for name, task in tasks.items():
        click.echo(f"{name} returned")
        print_value(task.expected if len(task.expected) != 1 else task.expected[0], sys.stdout)


def _compare_record(path: Path, report: Report, fail_on_noise: bool) -> None:
    from torchfuse.devices.saved_run import run_from_record

    run = run_from_record(path)
    report.open({"record": str(path)})
    report.take(run)
    report.save()
    _show([run], report, observer=False)
    _end([run], fail_on_noise)


def _show(runs: "Sequence[DeviceRun]", report: Report, *, observer: bool) -> None:
    from torchfuse.measuring.speed_benchmark import observer_line
    from torchfuse.render.bench_text import block, closing, heading

    report.print()
    for run in runs:
        if report.printed is not None:
            _warn(run, len(runs))
            continue
        if observer:
            for measured in run.measurements:
                for sample_s in measured.samples_s:
                    click.echo(observer_line(round(sample_s * 1e9)))
        if not run.measurements:
            continue
        click.echo(heading(run) + "\n")
        for measured in run.measurements:
            click.echo(block(measured) + "\n")
        for name, difference in run.differences:
            click.echo(f"{name}: outputs there and here differ by {_difference(difference)}")
        if len(run.measurements) > 1:
            click.echo(closing(run.measurements, run.device) + "\n")
        if run.profiles:
            _show_profiles(run.profiles)
        _warn(run, len(runs))


def _warn(run: "DeviceRun", count: int) -> None:
    for caution in run.cautions:
        where = "" if count == 1 else f"{run.device.name}: "
        click.echo(f"Warning: {where}{caution}.", err=True)


def _difference(difference: Any) -> str:
    if difference.max_abs == 0:
        return "nothing"
    return f"at most {difference.max_abs:.2g} ({decibels(difference.sqnr_db)})"


def _end(runs: "Sequence[DeviceRun]", fail_on_noise: bool) -> None:
    """Raise what ended a run early; end with status 3 for noise, where that was asked for."""
    errors = [run.error for run in runs if run.error is not None]
    for error in errors[:-1]:
        click.echo(f"torchfuse: error: {error}", err=True)
    if errors:
        raise DeviceError(errors[-1])
    noisy = [caution for run in runs for caution in run.cautions if caution.fails]
    if fail_on_noise and noisy:
        click.echo(
            f"torchfuse: {len(noisy)} of the warnings above make these figures worth little "
            "(--fail-on-noise).",
            err=True,
        )
        sys.exit(NOISE)


def _distinct(artifacts: Sequence[str]) -> dict[str, str]:
    """Return name → path; a path given again is measured again, under a name of its own."""
    names: dict[str, str] = {}
    for path in artifacts:
        name, again = path, 2
        while name in names:
            name, again = f"{path} ({again})", again + 1
        names[name] = path
    return names


def _refuse_nan(path: str, task: "Task") -> None:
    if any(leaf.is_floating_point() and leaf.isnan().any() for leaf in task.expected):
        raise InputError(
            f"The model in '{path}' returns NaN for these inputs, so its time says nothing "
            "about real ones; repair the model, or give a bundled input that it was made for."
        )
