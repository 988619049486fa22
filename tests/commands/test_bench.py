"""`torchfuse bench` on real model files."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import torchfuse
from torchfuse.cases import Case
from torchfuse.cli import cli, main
from torchfuse.commands.bench_meanwhile import Progress
from torchfuse.devices import several
from torchfuse.lowering.capture import capture
from torchfuse.targets.executorch.xnnpack import lower

Files = Callable[[str], str]
Bench = Callable[..., tuple[int, str, str]]

DIMS = "--input_dims=1,3,4,4"
NUMBER = r"[0-9.e+]+"
TIME = rf"{NUMBER} (s|ms|µs|ns)"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run `torchfuse bench …` in this process; status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["torchfuse", "bench", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        printed, errors = capsys.readouterr()
        return ended.value.code, printed, errors

    return run


def test_an_exported_program_is_no_file_to_run_and_it_is_said_how_to_make_one(
    bench: Bench, tmp_path: Path
) -> None:
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(2),)), path)
    status, _, errors = bench(str(path))
    assert status == 2
    assert f"'torchfuse export {path} -o model.pte'" in errors


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_state_dict_is_no_file_to_run_and_it_is_said_what_it_is_for(
    bench: Bench, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"net{suffix}"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    status, _, errors = bench(str(path))
    assert status == 2
    assert "load it into the model that torchfuse.fuse returns, and export that" in errors


def test_with_model_it_is_speed_benchmark_torch(bench: Bench, model_files: Files) -> None:
    status, printed, errors = bench(
        f"--model={model_files('third.pt')}", DIMS, "--input_type=float"
    )
    assert (status, errors) == (0, "")
    assert re.fullmatch(
        r"Starting benchmark\.\nRunning warmup runs\.\nMain runs\.\n"
        rf"Main run finished\. Microseconds per iter: {NUMBER}\. Iters per second: {NUMBER}\n",
        printed,
    )


def test_with_model_there_are_ten_runs_and_no_warm_up_unless_said_otherwise(
    bench: Bench, model_files: Files, tmp_path: Path
) -> None:
    saved = tmp_path / "out.json"
    flags = ["--model", model_files("third.pt"), DIMS, "--input_type=float", "--json", str(saved)]
    assert bench(*flags)[0] == 0
    (result,) = json.loads(saved.read_text())["runs"][0]["results"]
    assert (len(result["samples_s"]), result["warmup_runs"]) == (10, 0)
    assert bench(*flags, "--iter", "3", "--warmup=2", "--threads=2", "--report_pep=true")[0] == 0
    (result,) = json.loads(saved.read_text())["runs"][0]["results"]
    assert (len(result["samples_s"]), result["warmup_runs"], result["threads"]) == (3, 2, 2)


def test_one_artifact_is_a_block(bench: Bench, model_files: Files) -> None:
    path = model_files("third.pte")
    status, printed, _ = bench(path, DIMS)
    assert status == 0
    assert re.fullmatch(
        rf"On local: .*; measured by torchfuse\n\n{re.escape(path)}\n"
        rf"  Time \(median ± IQR\):   {TIME} ± {TIME}    {NUMBER} per second\n"
        rf"  Range \(min … max\):     {TIME} … {TIME}    p5 … p95: {TIME} … {TIME}\n"
        rf"  Load: {TIME}    first inference: {TIME}    memory: .*    file: 2\.\d\d kB\n"
        r"  50 runs after \d+ warm-up runs, 1 thread\n\n",
        printed,
    )


def test_several_artifacts_are_compared_in_a_closing_sentence(
    bench: Bench, model_files: Files
) -> None:
    paths = [model_files(name) for name in ("third.pt", "third.ptl", "third.pte")]
    status, printed, _ = bench(*paths, DIMS, "--iter=8", "--warmup=1")
    assert status == 0
    assert printed.count("Time (median ± IQR)") == 3
    assert printed.count("8 runs after 1 warm-up runs, 1 thread") == 3
    *_, first, second, third, _ = printed.splitlines()
    assert re.fullmatch(r".*/third\.pt[le]? ran, on \w+,", first)
    for line in (second, third):
        assert re.fullmatch(
            r"  (with no measurable difference \(95% interval [0-9.]+ … [0-9.]+\) to"
            r"|[0-9.]+ times \(95% interval [0-9.]+ … [0-9.]+\) as fast as) .*/third\.pt[le]?",
            line,
        )


def test_an_artifact_given_twice_is_measured_against_itself(
    bench: Bench, model_files: Files
) -> None:
    path = model_files("third.pt")
    _, printed, _ = bench(path, path, DIMS, "--iter=5")
    assert f"\n{path} (2)\n  Time" in printed


def test_json_holds_every_sample_the_machine_and_the_ratio(
    bench: Bench, model_files: Files, tmp_path: Path
) -> None:
    saved = tmp_path / "out.json"
    paths = [model_files("third.pt"), model_files("third.pte")]
    status, _, _ = bench(*paths, DIMS, "--iter=4", f"--json={saved}", "--threads=2")
    report = json.loads(saved.read_text())
    (run,) = report["runs"]
    assert status == 0
    assert [result["name"] for result in run["results"]] == paths
    assert all(len(result["samples_s"]) == 4 for result in run["results"])
    assert all(result["threads"] == 2 for result in run["results"])
    assert report["versions"]["torch"].startswith("2.13")
    assert {run["times_as_fast"][0]["fastest"], run["times_as_fast"][0]["other"]} == {*paths}
    assert run["device"]["cores"] is not None


@pytest.fixture
def interrupted(
    bench: Bench, model_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The report of a run that Ctrl-C ended after three of fifteen rounds."""
    saved = tmp_path / "out.json"
    with monkeypatch.context() as patched:

        def ctrl_c(_progress: object, _device: str, step: str) -> None:
            if step == "round 4 of 15":
                raise KeyboardInterrupt

        patched.setattr("torchfuse.commands.bench_meanwhile.Progress.show", ctrl_c)
        status, _, errors = bench(
            *map(model_files, ("third.pt", "third.pte")), DIMS, "--iter=30", f"--json={saved}"
        )
    assert (status, errors) == (
        130,
        f"torchfuse: interrupted; the rounds until then are in '{saved}', and --resume goes on "
        "with them.\n",
    )
    return saved


def test_what_was_measured_is_saved_when_the_run_is_interrupted(interrupted: Path) -> None:
    (run,) = json.loads(interrupted.read_text())["runs"]
    assert [len(result["samples_s"]) for result in run["results"]] == [6, 6]


def test_an_interrupted_run_goes_on_where_it_was(
    bench: Bench, model_files: Files, interrupted: Path
) -> None:
    before = json.loads(interrupted.read_text())["runs"][0]["results"]
    paths = [model_files("third.pt"), model_files("third.pte")]
    status, _, errors = bench(*paths, DIMS, "--iter=30", f"--json={interrupted}", "--resume")
    after = json.loads(interrupted.read_text())["runs"][0]["results"]
    assert status == 0
    assert errors.count("the first 6 runs of each are an earlier run's (--resume)") == 1
    for earlier, result in zip(before, after, strict=True):
        assert result["samples_s"][:6] == earlier["samples_s"]
        assert len(result["samples_s"]) == 30
        assert result["round_id"] == earlier["round_id"]


def test_a_run_of_something_else_is_not_gone_on_with(
    bench: Bench, model_files: Files, interrupted: Path, tmp_path: Path
) -> None:
    text = interrupted.read_text()
    paths = [model_files("third.pt"), model_files("third.pte")]
    flags = [f"--json={interrupted}", "--resume"]
    message = failure(bench(*paths, DIMS, "--iter=40", *flags))
    assert "cannot be gone on with, since its runs differ: 30 then, 40 now; leave out" in message
    assert "its files differ" in failure(bench(paths[0], DIMS, "--iter=30", *flags))
    assert interrupted.read_text() == text
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert "but it is something else" in failure(bench(*paths, DIMS, "--resume", f"--json={other}"))
    assert "give --json with the file" in failure(bench(*paths, DIMS, "--resume"))


def test_csv_and_markdown_are_saved_beside_json(
    bench: Bench, model_files: Files, tmp_path: Path
) -> None:
    rows, tables = tmp_path / "out.csv", tmp_path / "out.md"
    path = model_files("third.pt")
    assert bench(path, DIMS, "--iter=3", f"--csv={rows}", f"--markdown={tables}")[0] == 0
    assert rows.read_text().splitlines()[1].startswith("local,")
    assert f"| {path} | " in tables.read_text()


def test_noise_ends_with_status_3_where_that_was_asked_for(
    bench: Bench, model_files: Files
) -> None:
    many = str(len(os.sched_getaffinity(0)) + 7)
    words = [model_files("third.pt"), DIMS, "--iter=6", f"--threads={many}"]
    status, _, errors = bench(*words)
    assert status == 0
    assert re.search(r"^Warning: there are \d+ threads for \d+ usable cores?,", errors, re.M)
    status, printed, errors = bench(*words, "--fail-on-noise")
    assert status == 3
    assert "Time (median ± IQR)" in printed
    assert "make these figures worth little (--fail-on-noise)" in errors


def test_what_the_runner_saved_elsewhere_is_compared_here(
    bench: Bench, model_files: Files, tmp_path: Path
) -> None:
    saved = tmp_path / "events.txt"
    words = ["--input", "1x3x4x4", "--runs", "8", "--save", str(saved)]
    names = [model_files("third.pt"), model_files("third.pte")]
    ran = subprocess.run(
        [sys.executable, "-m", "torchfuse.runner", *words, *names], capture_output=True, text=True
    )
    assert ran.returncode == 0
    assert ran.stdout.count("8 runs, threads: 1") == 2
    status, printed, _ = bench("--read", str(saved))
    assert status == 0
    assert printed.startswith("On events.txt: ")
    assert f"\n{names[1]}\n  Time" in printed
    assert " ran, on " in printed
    cut = tmp_path / "cut.txt"
    cut.write_text("\n".join(saved.read_text().splitlines()[:-3]) + '\n{"kind": "rou')
    status, printed, errors = bench("--read", str(cut))
    assert "ends before the run did" in errors
    assert "Expected what 'python3 -m torchfuse.runner --save' wrote" in failure(
        bench("--read", __file__)
    )


def test_the_most_expensive_operators_are_shown_side_by_side(
    bench: Bench, model_files: Files, tmp_path: Path
) -> None:
    tables = tmp_path / "out.md"
    paths = [model_files("third.pt"), model_files("third.ptl")]
    status, printed, _ = bench(*paths, DIMS, "--iter=3", "--profile", f"--markdown={tables}")
    assert status == 0
    assert re.search(r"^operator +calls +time +share +calls +time +share", printed, re.M)
    assert re.search(r"^aten::mul +1 +", printed, re.M)
    assert "| aten::mul | 1 |" in tables.read_text()


def test_a_profile_that_no_runtime_here_keeps_is_refused_before_measuring(
    bench: Bench, model_files: Files
) -> None:
    message = failure(bench(model_files("third.pt"), DIMS, "--profile", "--device=ssh:board"))
    assert "got a model on a device" in message


def test_types_formats_and_flags_of_the_tool_are_taken(bench: Bench, model_files: Files) -> None:
    status, printed, _ = bench(
        model_files("sum.pt"),
        "--input_dims=1,2,3,4;5",
        "--input_type=float;int64",
        "--input_memory_format=channels_last;contiguous_format",
        "--print_output=true",
        "--report_pep",
        "1",
        "--iter=2",
    )
    assert status == 0
    assert printed.startswith(f"{model_files('sum.pt')} returned\n29\n[ CPUFloatType{{}} ]\n")
    assert printed.count('PyTorchObserver {"type": "NET"') == 2


@pytest.mark.parametrize("name", ["bundled.pt", "bundled.ptl"])
def test_bundled_inputs_and_no_inputs_need_no_dims(
    bench: Bench, model_files: Files, name: str
) -> None:
    status, printed, _ = bench(
        model_files(name), "--use_bundled_input=1", "--print_output=1", "--iter=1"
    )
    assert (status, "[ CPUFloatType{1,2} ]" in printed) == (0, True)
    assert bench(model_files("constant.pt"), "--no_inputs=true", "--iter=1")[0] == 0


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The path of a file that `torchfuse.export` made for the given inputs."""
    folder = tmp_path_factory.mktemp("exported")

    class Add(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return x + mask

    def made(name: str, *sizes: int) -> str:
        x = torch.rand(sizes)
        given = Case((x,), {"mask": torch.ones(sizes, dtype=torch.int64)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of so small a model, everything matters
            torchfuse.export(Add().eval(), given, folder / name)
        return str(folder / name)

    return made


def test_files_of_export_know_their_inputs(
    bench: Bench, exported: Callable[..., str], tmp_path: Path
) -> None:
    saved = tmp_path / "out.json"
    paths = [exported(name, 1, 2) for name in ("add.pt", "add.pte")]
    status, printed, errors = bench(*paths, "--iter=3", "--print_output=1", f"--json={saved}")
    assert status == 0, errors
    assert printed.count(" 2  2\n[ CPUFloatType{1,2} ]") == 2  # ones and ones
    assert "Inputs, as the files say: 1x2:float32, mask=1x2:int64 (--input: others).\n" in errors
    assert json.loads(saved.read_text())["settings"]["inputs"] == {
        "args": [{"ones": [1, 2], "dtype": "float32"}],
        "kwargs": {"mask": {"ones": [1, 2], "dtype": "int64"}},
    }
    status, _, errors = bench(*paths, "--iter=6", f"--json={saved}", "--resume")
    assert "cannot be gone on with, since its runs differ" in errors


def test_input_says_others_than_the_files(bench: Bench, exported: Callable[..., str]) -> None:
    path = exported("add.pt", 1, 2)
    words = ["--input=1x3", "--input", "mask=1x3:int64", "--iter=3", "--print_output=1"]
    status, printed, errors = bench(path, *words)
    assert status == 0, errors
    assert " 2  2  2\n[ CPUFloatType{1,3} ]" in printed
    assert "Inputs, as the files say" not in errors


def test_files_for_different_inputs_are_not_compared(
    bench: Bench, exported: Callable[..., str]
) -> None:
    small, large = exported("small.pt", 1, 2), exported("large.pt", 1, 3)
    message = failure(bench(small, large))
    assert f"'{small}' was made for 1x2:float32, mask=1x2:int64 and '{large}' for 1x3" in message
    assert "times on different inputs cannot be compared; give --input for both." in message


def test_a_program_of_others_says_what_it_takes(bench: Bench, tmp_path: Path) -> None:
    program = capture(nn.Linear(3, 2).eval(), Case((torch.ones(4, 3),)))
    (tmp_path / "foreign.pte").write_bytes(lower(program).program)
    status, _, errors = bench(str(tmp_path / "foreign.pte"), "--iter=3")
    assert status == 0, errors
    assert "Inputs, as the files say: 4x3:float32 (" in errors


@pytest.mark.parametrize("name", ["third.pt", "third.pte"])
def test_a_device_is_given_the_same_inputs(
    bench: Bench, model_files: Files, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}

    def benched(tasks: dict[str, Any], devices: list[str], *_: object, **__: object) -> list[Any]:
        given.update({device: [task.case for task in tasks.values()] for device in devices})
        return []

    monkeypatch.setattr("torchfuse.devices.several.bench_devices", benched)
    words = ["--input=1x3x4x4"] if name == "third.pt" else []
    assert bench(model_files(name), "--device=ssh:board", "--device=local", *words)[0] == 0
    assert list(given) == ["ssh:board", "local"]
    for (case,) in given.values():
        assert torch.equal(case.args[0], torch.ones(1, 3, 4, 4))


def test_input_is_not_for_the_tool(bench: Bench, model_files: Files) -> None:
    words = [f"--model={model_files('third.pt')}", "--input=1x3x4x4"]
    assert "--input goes with ARTIFACT names" in failure(bench(*words))


def failure(result: tuple[int, str, str]) -> str:
    """What an error says: one line on stderr, nothing on stdout, a status that is not zero."""
    status, printed, errors = result
    assert (status, printed) == (2, "")
    (line,) = errors.splitlines()
    return line


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("third.pt", [], r"third\.pt' does not say what inputs it takes, .*: --input 1x3x224x224"),
        ("third.pt", ["--input=1xx3"], r"'1xx3' is not an input: expected sizes joined by x"),
        ("third.pt", ["--input=1x3:half"], r"asks for the dtype 'half', which is none of"),
        ("third.pt", ["--input=x=1", "--input=x=2"], r"--input x=… is given twice"),
        ("third.pt", ["--input=1x3", DIMS], r"Expected --input or --input_dims, got both; --input"),
        ("third.pt", ["--input=1x3", "--no_inputs=true"], r"--input or --no_inputs, got both"),
        ("third.pt", ["--input=1x3", "--input_type=float"], r"--input or --input_type, got both"),
        ("third.pt", ["--input_type=uint8_t"], r"--input_type is about --input_dims; give that"),
        ("third.pte", ["--input=2x2"], r"1×3×4×4 float32.* got 2×2 float32"),
        ("third.pte", ["--input=1x3x4x4:uint8"], r"1×3×4×4 float32.* got 1×3×4×4 uint8"),
        ("third.pt", ["--input_dims=1,x"], r"Input dims should be numbers separated by commas"),
        ("third.pt", [DIMS, "--input_type=half"], r"Unsupported input type: half"),
        ("third.pt", [DIMS, "--threads=0"], r"threads must be 1 or more, got 0\."),
        ("third.pt", [DIMS, "--iter=0"], r"runs must be 1 or more, got 0\."),
        ("third.pt", [DIMS, "--warmup=-1"], r"warmup must be zero or more, got -1\."),
        ("third.pt", [DIMS, "--vulkan=true"], r"have no Vulkan; leave out --vulkan\."),
        (
            "third.pt",
            [DIMS, "--model=m.pt"],
            r"ARTIFACT names, --model, --read or --etdump, got ARTIFACT names and --model",
        ),
        (
            "fixed.pt",
            [DIMS],
            r"fixed\.pt' cannot run on these inputs: RuntimeError: mat2 must be a",
        ),
        ("third.pte", ["--input_dims=2,2"], r"1×3×4×4 float32.* got 2×2 float32"),
        ("root.pt", ["--input_dims=2,2"], r"root\.pt' returns NaN for these inputs, so its time"),
        ("third.pt", [DIMS, "--use_bundled_input=0"], r"Model does not have bundled inputs\. "),
        ("bundled.pt", ["--use_bundled_input=9"], r"Model has only 2 bundled inputs\."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_a_one_line_error(
    bench: Bench, model_files: Files, name: str, flags: list[str], message: str
) -> None:
    assert re.search(message, failure(bench(model_files(name), *flags)))


def test_neither_artifact_nor_model_is_an_error(bench: Bench) -> None:
    assert "ARTIFACT names, --model, --read or --etdump, got none of them" in failure(bench())


def test_a_missing_file_an_unknown_suffix_and_a_damaged_file_are_errors(
    bench: Bench, model_files: Files, tmp_path: Path
) -> None:
    assert "none.pte' does not exist" in failure(bench(str(tmp_path / "none.pte"), DIMS))
    assert "with suffix '.tflite'" in failure(bench("model.tflite", DIMS))
    for name in ("third.pt", "third.ptl", "third.pte"):
        data = bytearray(Path(model_files(name)).read_bytes())
        data[len(data) // 2] ^= 0xFF
        damaged = tmp_path / name
        damaged.write_bytes(data)
        assert "is damaged or of another kind" in failure(bench(str(damaged), DIMS))
        damaged.write_bytes(os.urandom(4000))
        assert "is damaged or of another kind" in failure(bench(str(damaged), DIMS))


def test_a_json_file_that_cannot_be_written_is_known_before_measuring(
    bench: Bench, model_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object, **__: object) -> None:
        raise AssertionError("measured before the file was known to be writable")

    monkeypatch.setattr(several, "measure_prepared", measured)
    path = tmp_path / "missing" / "out.json"
    assert "does not exist; create it first" in failure(
        bench(model_files("third.pt"), DIMS, f"--json={path}")
    )
    read_only = tmp_path / "out.json"
    read_only.write_text("earlier")
    read_only.chmod(0o444)
    if not os.access(read_only, os.W_OK):  # root may write anywhere
        assert "read-only" in failure(bench(model_files("third.pt"), DIMS, f"--json={read_only}"))


@pytest.mark.parametrize(
    ("bytes_left", "message"),
    [(100, "The inputs (192 bytes) cannot be written to "), (1000, "Cannot write ")],
)
def test_a_full_disk_is_a_one_line_error_and_leaves_the_earlier_report(
    model_files: Files, tmp_path: Path, bytes_left: int, message: str
) -> None:
    saved = tmp_path / "out.json"
    saved.write_text("earlier")

    def small_files_only() -> None:
        # The limit on a file's size fails a write as a full disk does, with no disk to fill.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, bytes_left))

    child = subprocess.run(
        [
            *(sys.executable, "-m", "torchfuse", "bench"),
            *(model_files("third.pt"), DIMS, f"--json={saved}"),
        ],
        preexec_fn=small_files_only,
        # Python does not notice that its bytecode is cut off, and fails at the next import.
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 2
    assert child.stderr.splitlines()[-1].startswith(f"torchfuse: error: {message}")
    assert saved.read_text() == "earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


def test_a_bad_artifact_leaves_the_earlier_report(
    bench: Bench, model_files: Files, tmp_path: Path
) -> None:
    saved = tmp_path / "out.json"
    saved.write_text("earlier")
    failure(bench(str(tmp_path / "none.pt"), DIMS, f"--json={saved}"))
    failure(
        bench("--model", str(tmp_path / "none.pt"), DIMS, "--input_type=float", f"--json={saved}")
    )
    assert saved.read_text() == "earlier"


def test_help_names_every_flag_and_needs_no_torch() -> None:
    program = (
        "import sys; sys.argv = ['torchfuse', 'bench', '--help']\n"
        "from torchfuse.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (child.returncode, child.stderr) == (0, "")
    for flag in ("--model", "--input_dims", "--pytext_len", "--vulkan", "--threads", "--json"):
        assert flag in child.stdout
    assert "torchfuse bench plain.pt fused.pt model.pte\n" in child.stdout


def test_a_run_by_other_versions_is_not_gone_on_with(
    bench: Bench, model_files: Files, interrupted: Path
) -> None:
    report = json.loads(interrupted.read_text())
    report["versions"]["torch"] = "1.0"
    interrupted.write_text(json.dumps(report))
    paths = [model_files("third.pt"), model_files("third.pte")]
    message = failure(bench(*paths, DIMS, "--iter=30", f"--json={interrupted}", "--resume"))
    assert "cannot be gone on with, since its versions differ: " in message


@pytest.mark.parametrize(
    "text", ["[]", "5", '{"settings": [], "versions": {}, "runs": []}', "{", "\0", ""]
)
def test_what_is_no_report_is_not_gone_on_with(
    bench: Bench, model_files: Files, tmp_path: Path, text: str
) -> None:
    saved = tmp_path / "out.json"
    saved.write_text(text)
    words = [model_files("third.pt"), DIMS, f"--json={saved}", "--resume"]
    assert "but it is something else" in failure(bench(*words))
    assert saved.read_text() == text


def test_a_process_that_ends_amid_the_rounds_leaves_what_was_measured(
    bench: Bench, model_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "out.json"

    def killed(_progress: object, _device: str, step: str) -> None:
        if step == "round 4 of 15":
            (nursery,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            workers = Path(f"/proc/{nursery}/task/{nursery}/children").read_text().split()
            os.kill(int(workers[0]), signal.SIGKILL)

    monkeypatch.setattr("torchfuse.commands.bench_meanwhile.Progress.show", killed)
    path = model_files("third.pt")
    status, printed, errors = bench(path, DIMS, "--iter=30", f"--json={saved}")
    assert status == 2
    assert f"{path} ran here, but not in a process of its own: its process ended by signal 9" in (
        errors
    )
    assert re.search(r"\n  \d runs after", printed)
    (run,) = json.loads(saved.read_text())["runs"]
    assert 4 <= len(run["results"][0]["samples_s"]) < 30
    assert "by signal 9 (SIGKILL)" in run["error"]


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e300"])
def test_a_timeout_that_no_device_can_take_is_an_error(
    bench: Bench, model_files: Files, seconds: str
) -> None:
    message = failure(bench(model_files("third.pt"), DIMS, f"--timeout={seconds}"))
    assert "--timeout must be more than 0 seconds and at most 86400, got " in message


def test_one_file_for_two_reports_is_an_error(
    bench: Bench, model_files: Files, tmp_path: Path
) -> None:
    words = [f"--json={tmp_path}/out", f"--csv={tmp_path}/./out"]
    assert "got one twice" in failure(bench(model_files("third.pt"), DIMS, *words))


def test_noise_is_not_judged_where_the_tool_measures(bench: Bench, model_files: Files) -> None:
    words = [f"--model={model_files('third.pt')}", DIMS, "--input_type=float", "--fail-on-noise"]
    assert "--fail-on-noise goes with ARTIFACT names" in failure(bench(*words))


def test_no_folder_for_temporary_files_is_a_one_line_error(
    bench: Bench, model_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("torchfuse.temporary.tempfile.TemporaryDirectory", none)
    message = failure(bench(model_files("third.pt"), DIMS))
    assert message.startswith("torchfuse: error: No temporary folder can be made: No usable")


def test_what_each_device_is_at_is_shown_on_a_terminal_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torchfuse.commands.bench_meanwhile._SAVE_AND_SHOW_EVERY_S", 0.0)
    for terminal in ("1", None):
        if terminal is None:
            monkeypatch.delenv("FORCE_COLOR")
        else:
            monkeypatch.setenv("FORCE_COLOR", terminal)  # as a terminal, to rich
        with Progress() as progress:
            progress.show("local", "round 1 of 3")
            progress.show("ssh:[::1]", "pushing")
        shown = capsys.readouterr().err
        assert ("local: round 1 of 3    ssh:[::1]: pushing" in shown) == (terminal is not None)


def test_a_quiet_run_shows_nothing_of_its_steps(
    model_files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torchfuse.commands.bench_meanwhile._SAVE_AND_SHOW_EVERY_S", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal, to rich
    words = ["bench", model_files("third.pt"), DIMS, "--iter=2", "--warmup=0", "--csv=-"]
    assert "round 1 of 2" in CliRunner().invoke(cli, words).stderr
    assert "round 1 of 2" not in CliRunner().invoke(cli, [*words, "--quiet"]).stderr


@pytest.mark.parametrize("form", ["json", "csv", "markdown"])
def test_a_dash_prints_the_form_in_place_of_the_text(
    model_files: Callable[[str], str], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["bench", model_files("third.pt"), DIMS, "--iter=2", "--warmup=0", f"--{form}", "-"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert "Time (median" not in result.stdout
    start = {"json": "{", "csv": "device,", "markdown": "local: "}[form]
    assert result.stdout.startswith(start)
    assert list(tmp_path.iterdir()) == []
