"""The graph and the node data as Model Explorer reads them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from torchfuse.cli import cli
from torchfuse.comparing.comparison import NOT_FUSED, Comparison, LayerNoise, Operation, Row
from torchfuse.errors import InputError
from torchfuse.measuring.timing import Measurement
from torchfuse.render.model_explorer import model_explorer_files
from torchfuse.stats import Ratio
from torchfuse.verifying.equivalence import Equivalence

COMPARISON = Comparison(
    "Net",
    (),
    (),
    layers=(
        LayerNoise("b.conv", "conv2d", 20.0, 30.0, ""),
        LayerNoise("a", "conv2d", math.inf, None, ""),
    ),
    before=(
        Operation("conv", "a", (1, 8), (), 1e-3),
        Operation("conv", "b.conv", (1, 8), (0,), 3e-3),
        Operation("relu", "b.act", (1, 8), (1,)),
    ),
    after=(Operation("conv", "a", (1, 8), (), 2e-3),),
)


def test_every_call_is_a_node_in_its_module_with_its_edges() -> None:
    before, after = json.loads(model_explorer_files(COMPARISON)["graph.json"])
    assert (before["id"], after["id"]) == ("before", "after")
    assert [(node["id"], node["label"], node["namespace"]) for node in before["nodes"]] == [
        ("0", "conv", "a"),
        ("1", "conv", "b/conv"),
        ("2", "relu", "b/act"),
    ]
    (edge,) = before["nodes"][2]["incomingEdges"]
    assert edge["sourceNodeId"] == "1"


def test_what_was_measured_is_node_data_by_the_nodes_of_each_graph() -> None:
    files = model_explorer_files(COMPARISON)
    times, noises = json.loads(files["time_ms.json"]), json.loads(files["noise_db.json"])
    assert times["before"]["results"] == {"0": {"value": 1.0}, "1": {"value": 3.0}}
    assert times["after"]["results"] == {"0": {"value": 2.0}}
    assert [stop["stop"] for stop in times["before"]["gradient"]] == [0, 1]
    assert noises == {"before": {"results": {"1": {"value": 20.0}}, "gradient": [
        {"stop": 0, "bgColor": "#ff9f5c"}, {"stop": 1, "bgColor": "#ffffff"}]}}  # fmt: skip


def test_what_was_not_measured_has_no_file() -> None:
    unmeasured = replace(COMPARISON, layers=(), before=COMPARISON.before[2:], after=())
    assert set(model_explorer_files(unmeasured)) == {"graph.json"}


def test_the_command_writes_them_beside_each_other(tmp_path: Path) -> None:
    row = Row(
        NOT_FUSED,
        "eager",
        "fp32",
        Measurement("m", (1e-3,) * 4, 1, True, 1),
        Ratio(1.0, 1.0, 1.0),
        None,
        Equivalence(()),
        None,
        None,
    )
    (tmp_path / "c.json").write_text(replace(COMPARISON, rows=(row,)).to_json())
    folder = tmp_path / "graphs"
    words = ["report", str(tmp_path / "c.json"), "--model-explorer", str(folder)]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert {path.name: path.read_text() for path in folder.iterdir()} == model_explorer_files(
        COMPARISON
    )


def test_a_report_without_a_file_to_write_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["report", str(tmp_path / "c.json")])
    assert isinstance(result.exception, InputError)
    with pytest.raises(InputError, match="Expected -o or --model-explorer, got neither"):
        raise result.exception
