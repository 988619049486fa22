"""Command-line flags as PyTorch's own C++ tools read them, oddities included.

Source: c10/util/flags_use_no_gflags.cpp, the reader that PyTorch's mobile builds have.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Flag", "FlagError", "HelpRequest", "help_text", "read_bool", "read_flags"]

FlagValue = str | int | bool


@dataclass(frozen=True)
class Flag:
    """One flag; its type is the type of its default."""

    name: str
    default: FlagValue
    help: str


class FlagError(Exception):
    """The flags cannot be read; the text is what the C++ tools write to stderr."""


class HelpRequest(Exception):  # noqa: N818  # not an error: somebody wants to read the help
    """An argument contains `--help`."""


def read_flags(flags: Sequence[Flag], arguments: Sequence[str]) -> dict[str, FlagValue]:
    """Return the value of every flag, given as `--name=value` or as `--name value`.

    A boolean needs its value too. What does not begin with two hyphens is ignored, an integer is
    read as far as it is one (`3x` is 3, `x` is 0), and the last of several values counts.

    Raises:
        FlagError: an unknown flag, a missing value, or a boolean that is none.
        HelpRequest: any argument contains `--help`, and no error came before it.
    """
    known = {flag.name: flag for flag in flags}
    values = {flag.name: flag.default for flag in flags}
    log = ["Parsing commandline arguments for c10.\n"]
    rest = iter(arguments)
    for argument in rest:
        if "--help" in argument:
            raise HelpRequest
        if not argument.startswith("--"):
            log.append(
                "C10 flag: commandline argument does not match --name=var or --name format: "
                f"{argument}. Ignoring this argument.\n"
            )
            continue
        name, has_value, value = argument[2:].partition("=")
        if not has_value:
            following = next(rest, None)
            if following is None:
                # c10 itself forgets the end of this line.
                log.append(
                    "C10 flag: reached the last commandline argument, but I am expecting a value "
                    f"for {argument}"
                )
                raise FlagError("".join(log))
            value = following
        if name not in known:
            log.append(f"C10 flag: unrecognized commandline argument: {argument}\n")
            raise FlagError("".join(log))
        try:
            values[name] = _read(known[name], value)
        except ValueError as error:
            log.append(f"{error}\nC10 flag: illegal argument: {argument}\n")
            raise FlagError("".join(log)) from error
    return values


def _read(flag: Flag, text: str) -> FlagValue:
    match flag.default:
        case bool():
            return read_bool(text)
        case int():
            return _atoi(text)
        case str():
            return text


def read_bool(text: str) -> bool:
    """Return the boolean that `text` is in c10's spelling.

    Raises:
        ValueError: it is none, with c10's explanation.
    """
    if text in ("true", "True", "TRUE", "1"):
        return True
    if text in ("false", "False", "FALSE", "0"):
        return False
    raise ValueError(
        f"C10 flag error: Cannot convert argument to bool: {text}\n"
        "Note that if you are passing in a bool flag, you need to explicitly specify it, like "
        "--arg=True or --arg True. Otherwise, the next argument may be inadvertently used as the "
        "argument, causing the above error."
    )


def _atoi(text: str) -> int:
    match = re.match(r"[ \t\n\v\f\r]*([+-]?[0-9]+)", text)
    value = int(match[1]) if match else 0
    # glibc's atoi is strtol, which stops at 64 bits, cut to 32.
    value = min(max(value, -(2**63)), 2**63 - 1)
    return (value + 2**31) % 2**32 - 2**31


_TYPE_NAMES: Mapping[type, str] = {str: "std::string", int: "int", bool: "bool"}


def help_text(usage: str, flags: Sequence[Flag]) -> str:
    """Return the text that `--help` prints."""
    lines = [usage, "Arguments: "]
    for flag in flags:
        default = f'"{flag.default}"' if isinstance(flag.default, str) else f"{flag.default}"
        if isinstance(flag.default, bool):
            default = default.lower()
        kind = _TYPE_NAMES[type(flag.default)]
        lines.append(f"    {flag.name}: ({kind}, default {default}) {flag.help}")
    return "\n".join(lines) + "\n"
