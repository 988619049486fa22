"""Where the time of a run goes: of models and TorchScript files, and of ETDump files."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import torchfuse
from support.etdumps import Logged, write_etdump
from torchfuse.errors import ArtifactError, InputError, UnsupportedError
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.measuring.profiling import profile
from torchfuse.operator_times import OperatorTime, Profile
from torchfuse.targets.executorch.etdump import THE_REST, profile_of_etdump

X = torch.ones(1, 3, 8, 8)


class Net(nn.Module):
    """Two convolutions, one of them with a batch norm, and a running sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(self.other(self.bn(self.conv(x))).relu(), 1)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def calls(found: Profile) -> dict[str, float]:
    return {row.operator: row.calls for row in found.operators}


def test_every_operator_of_a_model_is_counted_by_run() -> None:
    found = profile(net(), X, runs=3)
    assert (found.name, found.runs, found.source) == ("Net", 3, "torch.profiler")
    counted = calls(found)
    assert counted["aten::conv2d"] == 2
    assert counted["aten::batch_norm"] == 1
    assert counted["aten::cumsum"] == 1


def test_the_most_expensive_come_first_and_make_up_the_run() -> None:
    found = profile(net(), X, runs=3)
    times = [row.self_s for row in found.operators]
    assert times == sorted(times, reverse=True)
    assert sum(times) == pytest.approx(found.run_s)
    assert sum(row.share for row in found.operators) == pytest.approx(1)
    assert times[0] > 0


def test_what_fusing_removes_is_gone_from_the_profile() -> None:
    fused = profile(torchfuse.fuse(net(), X).model, X, runs=2, name="fused")
    assert fused.name == "fused"
    assert not any("batch_norm" in operator for operator in calls(fused))
    assert calls(fused)["aten::conv2d"] == 2


@pytest.mark.parametrize("name", ["third.pt", "third.ptl"])
def test_torchscript_files_are_profiled(model_files: Callable[[str], str], name: str) -> None:
    found = profile(model_files(name), X, runs=4)
    assert (found.name, found.runs) == (name, 4)
    assert calls(found)["aten::mul"] == 1


def test_inputs_may_be_named() -> None:
    assert calls(profile(net(), {"x": X}, runs=2))["aten::conv2d"] == 2


def test_threads_are_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    seen = []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return x + x

    profile(model, X, warmup=0, runs=2, threads=2)
    assert seen == [2, 2]
    assert torch.get_num_threads() == before


def test_the_profilers_own_lines_are_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    profile(net(), X, runs=1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore::torchfuse.DelegationWarning")  # a cumsum is outside of it
def test_a_program_is_profiled_by_its_own_runtime_with_the_delegates_kernels(
    tmp_path: Path,
) -> None:
    path = torchfuse.export(net().eval(), X, tmp_path / "net.pte").path
    found = profile(path, X, warmup=2, runs=3, threads=1)
    assert (found.name, found.runs, found.source) == ("net.pte", 3, "ETDump")
    convolutions = [row for row in found.operators if row.operator.startswith("Convolution")]
    assert sum(row.calls for row in convolutions) == 1  # the two are one in the program
    assert all(row.in_delegate for row in convolutions)


def test_a_file_of_a_runtime_that_is_not_asked_is_refused(tmp_path: Path) -> None:
    path = torchfuse.export(net().eval(), X, tmp_path / "net.onnx").path
    with pytest.raises(UnsupportedError, match=r"'.*net\.onnx': ONNX Runtime is not asked"):
        profile(path, X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"runs": 0}, "at least one run"),
        ({"warmup": -1}, "no fewer than zero warm-up runs"),
        ({"threads": 0}, "threads must be 1 or more"),
    ],
)
def test_counts_that_make_no_profile_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        profile(net(), X, **arguments)


def test_a_profile_belongs_to_one_input() -> None:
    with pytest.raises(InputError, match="belongs to one input, got 2 cases"):
        profile(net(), [X, X])


# One call of a delegate with two kernels inside, and one of a kernel of ExecuTorch's own.
RUN: list[Logged] = [
    ("Method::execute", -1, 0, 1000),
    ("DELEGATE_CALL", 0, 10, 610),
    (None, 0, 10, 310, "Convolution (NHWC, F32) IGEMM #1"),
    (None, 0, 310, 510, "Convolution (NHWC, F32) IGEMM #2"),
    ("OPERATOR_CALL", 1, 620, 920),
    ("native_call_cumsum.out", 1, 640, 900),
]


def moved(run: Sequence[Logged], by: int) -> list[Logged]:
    return [(e[0], e[1], e[2] + by, e[3] + by, *e[4:]) for e in run]  # type: ignore[misc]


def test_an_etdump_tells_of_kernels_and_of_what_a_delegate_ran_inside(tmp_path: Path) -> None:
    path = write_etdump(tmp_path / "run.etdump", [RUN, moved(RUN, 5000), moved(RUN, 10**10)])
    ns = 1e-9
    assert profile_of_etdump(path) == Profile(
        "run.etdump",
        (
            OperatorTime(
                "Convolution (NHWC, F32) IGEMM", 2, approx(500 * ns), approx(0.5), in_delegate=True
            ),
            OperatorTime("cumsum.out", 1, approx(260 * ns), approx(0.26)),
            OperatorTime(THE_REST, 1, approx(240 * ns), approx(0.24)),
        ),
        approx(1000 * ns),
        3,
        "ETDump",
    )


def approx(value: float) -> float:
    return pytest.approx(value)  # type: ignore[no-any-return]


def test_runs_that_took_another_way_count_too(tmp_path: Path) -> None:
    other: list[Logged] = [
        ("Method::execute", -1, 0, 400),
        ("OPERATOR_CALL", 5, 0, 400),
        ("native_call_add.out", 5, 0, 400),
    ]
    found = profile_of_etdump(write_etdump(tmp_path / "run.etdump", [RUN, other, moved(RUN, 9)]))
    assert found.runs == 3
    assert found.run_s == pytest.approx(800e-9)
    assert calls(found)["add.out"] == pytest.approx(1 / 3)
    assert calls(found)["cumsum.out"] == pytest.approx(2 / 3)


def test_a_call_that_says_nothing_about_its_inside_is_a_row_itself(tmp_path: Path) -> None:
    run: list[Logged] = [
        ("Method::execute", -1, 0, 1000),
        ("DELEGATE_CALL", 0, 0, 600),
        ("OPERATOR_CALL", 1, 600, 1000),
    ]
    found = profile_of_etdump(write_etdump(tmp_path / "run.etdump", [run]), name="fused")
    assert found.name == "fused"
    assert [(row.operator, row.in_delegate, row.share) for row in found.operators] == [
        ("DELEGATE_CALL", True, approx(0.6)),
        ("OPERATOR_CALL", False, approx(0.4)),
        (THE_REST, False, 0.0),
    ]


def test_a_clock_may_have_another_speed(tmp_path: Path) -> None:
    path = write_etdump(tmp_path / "run.etdump", [RUN])
    assert profile_of_etdump(path, ticks_per_s=1e6).run_s == pytest.approx(1e-3)


@pytest.fixture(scope="module")
def etrecord(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ExecuTorch records when it lowers Net: instruction 0 is XNNPACK's, 1 cumsum."""
    path = tmp_path_factory.mktemp("etrecord") / "net.etrecord"
    with known_warnings_ignored(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program = to_edge_transform_and_lower(
            torch.export.export(torchfuse.fuse(net(), X).model, (X,)),
            partitioner=[XnnpackPartitioner()],
            generate_etrecord=True,
        ).to_executorch()
        kinds = [
            type(instruction.instr_args).__name__
            for instruction in program.executorch_program.execution_plan[0].chains[0].instructions
        ]
        assert kinds == ["DelegateCall", "KernelCall"]
        program.get_etrecord().save(str(path))
    return path


def test_an_etrecord_adds_the_delegates_name_and_the_operators(
    tmp_path: Path, etrecord: Path
) -> None:
    named = profile_of_etdump(write_etdump(tmp_path / "run.etdump", [RUN]), etrecord=etrecord)
    assert [(row.operator, row.delegate) for row in named.operators] == [
        ("Convolution (NHWC, F32) IGEMM", "XnnpackBackend"),
        ("cumsum.out", None),
        (THE_REST, None),
    ]
    bare: list[Logged] = [
        ("Method::execute", -1, 0, 1000),
        ("DELEGATE_CALL", 0, 0, 600),
        ("OPERATOR_CALL", 1, 600, 1000),
    ]
    found = profile_of_etdump(write_etdump(tmp_path / "bare.etdump", [bare]), etrecord=etrecord)
    (delegate_call, operator_call, _) = found.operators
    assert (delegate_call.in_delegate, delegate_call.delegate) == (True, "XnnpackBackend")
    assert "convolution" in delegate_call.operator
    assert operator_call == OperatorTime("aten.cumsum.default", 1, approx(400e-9), approx(0.4))


def test_an_etdump_without_a_run_is_refused(tmp_path: Path) -> None:
    path = write_etdump(tmp_path / "loaded.etdump", [])
    with pytest.raises(ArtifactError, match=r"at least one run in '.*loaded.etdump', got none"):
        profile_of_etdump(path)


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut"])
def test_a_damaged_etdump_is_refused(tmp_path: Path, damage: str) -> None:
    path = write_etdump(tmp_path / "run.etdump", [RUN])
    whole = path.read_bytes()
    data = {"empty": b"", "garbage": b"\x13\x00\x00\x00" + b"no etdump at all", "cut": whole[:99]}
    path.write_bytes(data[damage])
    with pytest.raises(ArtifactError, match=r"Inspector cannot read '.*run.etdump'"):
        profile_of_etdump(path)


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"Expected a file at '.*none.etdump', found none"):
        profile_of_etdump(tmp_path / "none.etdump")
    path = write_etdump(tmp_path / "run.etdump", [RUN])
    with pytest.raises(ArtifactError, match=r"Expected a file at '.*none.etrecord', found none"):
        profile_of_etdump(path, etrecord=tmp_path / "none.etrecord")
    with pytest.raises(ArtifactError, match=r"cannot read '.*run.etdump' with '.*run.etdump'"):
        profile_of_etdump(path, etrecord=path)
