"""Flags as PyTorch's C++ tools read them; each expectation was seen in the C++ program."""

import pytest

from torchfuse.measuring.c10_flags import Flag, FlagError, HelpRequest, help_text, read_flags

FLAGS = (
    Flag("model", "", "The model."),
    Flag("iter", 10, "How often."),
    Flag("verbose", False, "Whether to say more."),
)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"model": "", "iter": 10, "verbose": False}),
        (["--iter=3"], {"iter": 3}),
        (["--iter", "3"], {"iter": 3}),
        (["--iter", "-3"], {"iter": -3}),
        (["--iter=3", "--iter=4"], {"iter": 4}),
        (["--iter=3x"], {"iter": 3}),
        (["--iter= +3"], {"iter": 3}),
        (["--iter=many"], {"iter": 0}),
        (["--iter="], {"iter": 0}),
        (["--iter=4294967297"], {"iter": 1}),
        (["--model=a=b"], {"model": "a=b"}),
        (["--model", "--iter"], {"model": "--iter"}),
        (["--model="], {"model": ""}),
        (["-iter=3", "stray", ""], {"iter": 10}),
        *[([f"--verbose={word}"], {"verbose": True}) for word in ("true", "True", "TRUE", "1")],
        *[([f"--verbose={word}"], {"verbose": False}) for word in ("false", "False", "FALSE", "0")],
        (["--verbose", "true"], {"verbose": True}),
    ],
    ids=str,
)
def test_flags_are_read(arguments: list[str], expected: dict[str, object]) -> None:
    values = read_flags(FLAGS, arguments)
    assert {name: values[name] for name in expected} == expected


START = "Parsing commandline arguments for c10.\n"


@pytest.mark.parametrize(
    ("arguments", "log"),
    [
        (["--bogus=1"], "C10 flag: unrecognized commandline argument: --bogus=1\n"),
        (["--bogus", "1"], "C10 flag: unrecognized commandline argument: --bogus\n"),
        (["--", "1"], "C10 flag: unrecognized commandline argument: --\n"),
        (
            ["--verbose"],
            "C10 flag: reached the last commandline argument, but I am expecting a value for "
            "--verbose",
        ),
        (
            ["--verbose=yes"],
            "C10 flag error: Cannot convert argument to bool: yes\n"
            "Note that if you are passing in a bool flag, you need to explicitly specify it, like "
            "--arg=True or --arg True. Otherwise, the next argument may be inadvertently used as "
            "the argument, causing the above error.\n"
            "C10 flag: illegal argument: --verbose=yes\n",
        ),
        (
            ["stray", "--bogus=1"],
            "C10 flag: commandline argument does not match --name=var or --name format: stray. "
            "Ignoring this argument.\n"
            "C10 flag: unrecognized commandline argument: --bogus=1\n",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_in_the_words_of_c10(arguments: list[str], log: str) -> None:
    with pytest.raises(FlagError) as refused:
        read_flags(FLAGS, arguments)
    assert str(refused.value) == START + log


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--iter=3", "x--help"], ["--help", "--bogus=1"]]
)
def test_help_anywhere_asks_for_help(arguments: list[str]) -> None:
    with pytest.raises(HelpRequest):
        read_flags(FLAGS, arguments)


def test_an_error_before_help_comes_first() -> None:
    with pytest.raises(FlagError):
        read_flags(FLAGS, ["--bogus=1", "--help"])


def test_the_help_lists_type_default_and_meaning() -> None:
    assert help_text("Run something.", FLAGS) == (
        "Run something.\n"
        "Arguments: \n"
        '    model: (std::string, default "") The model.\n'
        "    iter: (int, default 10) How often.\n"
        "    verbose: (bool, default false) Whether to say more.\n"
    )
