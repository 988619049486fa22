"""What runs a model file, and how an argument comes to it as JSON and raw files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchfuse.runner.runtimes import decoded, runtime_for


class Bytes:
    """A runtime whose tensors are what it was given."""

    def tensor(self, data: bytearray, dtype: str, shape: list[int], strides: list[int]) -> Any:
        return bytes(data), dtype, shape, strides


@pytest.mark.parametrize(
    ("value", "argument"),
    [
        (1, 1),
        (None, None),
        ("text", "text"),
        ([1, [2.5, True]], [1, [2.5, True]]),
        ({"tuple": [1, {"tuple": []}]}, (1, ())),
        ({"dict": {"tuple": 3, "a": [4]}}, {"tuple": 3, "a": [4]}),
        (
            {"file": "x.bin", "dtype": "int16", "shape": [1, 2], "strides": [2, 1]},
            (b"abcd", "int16", [1, 2], [2, 1]),
        ),
        (
            {"ones": [2, 1], "dtype": "int16"},
            (b"\x01\x00\x01\x00", "int16", [2, 1], [1, 1]),
        ),
        ({"ones": [], "dtype": "bool"}, (b"\x01", "bool", [], [])),
        ({"ones": [0, 3], "dtype": "float32"}, (b"", "float32", [0, 3], [3, 1])),
    ],
)
def test_an_argument_is_decoded_from_its_json_form(
    tmp_path: Path, value: Any, argument: Any
) -> None:
    (tmp_path / "x.bin").write_bytes(b"abcd")
    assert decoded(value, Bytes(), tmp_path) == argument  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    ],
)
def test_ones_of_each_type_are_ones_to_torch(tmp_path: Path, dtype: str) -> None:

    ones = decoded({"ones": [2, 3], "dtype": dtype}, runtime_for("pt"), tmp_path)
    assert ones.dtype == getattr(torch, dtype)
    assert torch.equal(ones, torch.ones(2, 3, dtype=ones.dtype))


def test_ones_of_another_type_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a type of float32, .*, got 'complex64'"):
        decoded({"ones": [1], "dtype": "complex64"}, runtime_for("pt"), tmp_path)


def test_a_file_of_another_form_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"one of '\.pte', .* with suffix '\.tflite'"):
        runtime_for("tflite")


def test_channels_last_stays_channels_last(tmp_path: Path) -> None:

    x = torch.randn(1, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    data = x.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    (tmp_path / "x.bin").write_bytes(data)
    value = {"file": "x.bin", "dtype": "float32", "shape": [1, 3, 2, 2], "strides": [12, 1, 6, 3]}
    got = decoded(value, runtime_for("pt"), tmp_path)
    assert torch.equal(got, x)
    assert got.stride() == x.stride()


def test_int8_weights_are_packed_for_the_engine_of_phones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packed_for = []
    before = torch.backends.quantized.engine
    monkeypatch.setattr(
        torch.jit,
        "load",
        lambda *_, **__: packed_for.append(torch.backends.quantized.engine) or nn.Identity(),
    )
    runtime_for("pt").load(str(tmp_path / "model.pt"), "pt")
    assert packed_for == ["qnnpack"]
    assert torch.backends.quantized.engine == before
