"""Two profiles beside each other."""

import io

from rich.console import Console

from torchfuse.operator_times import OperatorTime, Profile
from torchfuse.render.profile import markdown, table

NOT_FUSED = Profile(
    "not fused",
    (
        OperatorTime("aten::mkldnn_convolution", 2, 6e-3, 0.6),
        OperatorTime("aten::native_batch_norm", 2, 3e-3, 0.3),
        OperatorTime("aten::clamp", 1, 0.9e-3, 0.09),
        OperatorTime("aten::empty", 8, 1e-4, 0.01),
    ),
    10e-3,
    20,
    "torch.profiler",
)
FUSED = Profile(
    "fused",
    (
        OperatorTime("aten::mkldnn_convolution", 2, 6.3e-3, 0.875),
        OperatorTime("aten::clamp", 0.5, 0.9e-3, 0.125),
    ),
    7.2e-3,
    20,
    "torch.profiler",
)
DELEGATED = Profile(
    "net.etdump",
    (
        OperatorTime("Convolution", 2, 4e-6, 0.8, in_delegate=True, delegate="XnnpackBackend"),
        OperatorTime("a | b", 1, 1e-6, 0.2, in_delegate=True),
    ),
    5e-6,
    3,
    "ETDump",
)


def shown(*profiles: Profile, count: int = 10) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(table(profiles, count))
    return "".join(line.rstrip() + "\n" for line in out.getvalue().splitlines())


def test_fused_beside_non_fused_the_most_expensive_first() -> None:
    assert shown(NOT_FUSED, FUSED) == (
        "                         not fused                   fused\n"
        "operator                     calls      time   share calls      time   share\n"
        "aten::mkldnn_convolution         2   6.00 ms  60.0 %     2   6.30 ms  87.5 %\n"
        "aten::native_batch_norm          2   3.00 ms  30.0 %     –         –       –\n"
        "aten::clamp                      1 900.00 µs   9.0 %   0.5 900.00 µs  12.5 %\n"
        "aten::empty                      8 100.00 µs   1.0 %     –         –       –\n"
        "a run                               10.00 ms 100.0 %         7.20 ms 100.0 %\n"
    )


def test_what_is_not_among_the_most_expensive_is_summed_up() -> None:
    lines = shown(NOT_FUSED, FUSED, count=2).splitlines()
    assert lines[2].startswith("aten::mkldnn_convolution")
    assert lines[3].startswith("aten::native_batch_norm")
    assert " ".join(lines[4].split()) == "2 others 9 1.00 ms 10.0 % 0.5 900.00 µs 12.5 %"
    assert len(lines) == 6


def test_an_operator_inside_a_delegate_says_so() -> None:
    text = shown(DELEGATED)
    assert "Convolution (XnnpackBackend)" in text
    assert "a | b (in a delegate)" in text


def test_markdown_has_the_same_cells() -> None:
    assert markdown([NOT_FUSED, FUSED], count=2) == (
        "| operator | not fused calls | time | share | fused calls | time | share |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| aten::mkldnn_convolution | 2 | 6.00 ms | 60.0 % | 2 | 6.30 ms | 87.5 % |\n"
        "| aten::native_batch_norm | 2 | 3.00 ms | 30.0 % | – | – | – |\n"
        "| 2 others | 9 | 1.00 ms | 10.0 % | 0.5 | 900.00 µs | 12.5 % |\n"
        "| a run |  | 10.00 ms | 100.0 % |  | 7.20 ms | 100.0 % |\n"
    )


def test_a_name_cannot_break_a_markdown_table() -> None:
    assert r"| a \| b (in a delegate) |" in markdown([DELEGATED])
