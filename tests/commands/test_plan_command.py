"""`torchfuse plan MODEL`: the table, the JSON, and the exit status for use in CI."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from torchfuse import model_source
from torchfuse.cli import cli
from torchfuse.errors import InputError
from torchfuse.planning import FusionPlan

GOLDEN = Path(__file__).parent / "golden"
NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.conv(self.stem(x))
        return self.norm(y) + y


def net():
    return Net(), torch.zeros(1, 3, 10, 10)
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path / 'net.py'}:net"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["plan", *arguments])


def test_the_table_is_the_golden_one(net: str) -> None:
    result = run(net)
    assert result.exit_code == 0, result.output
    assert result.stdout == (GOLDEN / "plan.txt").read_text(encoding="utf-8")


def test_json_replaces_the_table(net: str) -> None:
    result = run(net, "--json")
    plan = FusionPlan.from_json(result.stdout)
    assert [fusion.modules for fusion in plan.fusions] == [("stem.0", "stem.1")]


def test_json_to_a_file_leaves_the_table_on_stdout(net: str, tmp_path: Path) -> None:
    result = run(net, "--json", str(tmp_path / "plan.json"))
    assert "1 fused, 1 not fused" in result.stdout
    assert json.loads((tmp_path / "plan.json").read_text())["model"] == "Net"


def test_an_exported_program_is_planned_too(net: str, tmp_path: Path) -> None:
    loaded = model_source.load(net)
    program = torch.export.export(loaded.model, (loaded.example_inputs,))
    torch.export.save(program, tmp_path / "net.pt2")
    plan = FusionPlan.from_json(run(str(tmp_path / "net.pt2"), "--json").stdout)
    assert [fusion.modules for fusion in plan.fusions] == [("stem.0", "stem.1")]
    assert [skip.modules for skip in plan.skips] == [("conv", "norm")]


def test_input_sets_the_sizes_that_savings_are_counted_for(net: str) -> None:
    small = FusionPlan.from_json(run(net, "--json").stdout)
    large = FusionPlan.from_json(run(net, "--input", "2x3x10x10", "--json").stdout)
    assert large.macs_saved == 2 * small.macs_saved


@pytest.mark.parametrize("rule", ["conv_bn", "any"])
def test_fail_on_skip_ends_with_status_1_and_says_which(net: str, rule: str) -> None:
    result = run(net, "--fail-on-skip", rule)
    assert result.exit_code == 1
    assert result.stderr.startswith("torchfuse: 1 skipped, first conv + norm: ")
    assert "1 fused" in result.stdout


def test_fail_on_skip_of_another_rule_passes(net: str) -> None:
    assert run(net, "--fail-on-skip", "linear_bn").exit_code == 0


def test_fail_on_skip_of_an_unknown_rule_is_an_error(net: str) -> None:
    result = run(net, "--fail-on-skip", "conv_nb")
    assert isinstance(result.exception, InputError)
    assert "'conv_nb' is no rule; the rules are conv_bn" in str(result.exception)


def test_a_target_that_folds_itself_is_named(net: str) -> None:
    result = run(net, "--target", "openvino")
    expected = "Fusing is not worth it for OpenVINO: it does all of this (1 fusion) itself."
    assert result.stdout.splitlines()[-1] == expected


def test_the_verdict_on_a_target_is_no_part_of_json_on_stdout(net: str) -> None:
    result = run(net, "--target", "openvino", "--json")
    FusionPlan.from_json(result.stdout)
    assert "Fusing is not worth it for OpenVINO" in result.stderr


def test_an_error_is_one_line_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torchfuse", "plan", str(tmp_path / "no.py:net")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("torchfuse: error: The file '")


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from torchfuse.cli import cli\n"
        "for name in ('plan', 'fuse'):\n"
        "    cli.main([name, '--help'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
