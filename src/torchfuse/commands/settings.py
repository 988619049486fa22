"""Options that a project keeps: [tool.torchfuse] in pyproject.toml, or torchfuse.toml."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfuse.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import click

__all__ = ["settings"]

_OWN = Path("torchfuse.toml")
_PROJECT = Path("pyproject.toml")


def settings(
    commands: Sequence[str], command: Callable[[str], click.Command | None], asked: str | None
) -> dict[str, dict[str, Any]]:
    """Return the options of the command that is asked for, as click's `default_map` takes them.

    They are those of torchfuse.toml in the folder that it runs in, else of [tool.torchfuse] in
    pyproject.toml there: a table for each command, whose keys are its options without the dashes.

    Raises:
        InputError: the file cannot be read, or has a command or an option that there is not.
    """
    path, tables = _tables()
    for name, table in tables.items():
        if name not in commands:
            raise InputError(f"'{path}' has [{name}], which is no command{_near(name, commands)}.")
        if not isinstance(table, dict):
            raise InputError(f"Expected a table of options as '{name}' in '{path}', got {table!r}.")
    found = command(asked) if asked in tables else None
    if found is None or asked is None:
        return {}
    return {asked: _by_parameter(path, asked, found, tables[asked])}


def _by_parameter(
    path: Path, name: str, command: click.Command, table: Mapping[str, Any]
) -> dict[str, Any]:
    options = {
        option.removeprefix("--"): parameter
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--")
    }
    found = {}
    for key, value in table.items():
        if key not in options:
            raise InputError(
                f"'{path}' has '{key}' in [{name}], which is no option of 'torchfuse {name}'"
                f"{_near(key, list(options))}."
            )
        parameter = options[key]
        assert parameter.name is not None
        found[parameter.name] = [value] if parameter.multiple and not _is_list(value) else value
    return found


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _tables() -> tuple[Path, dict[str, Any]]:
    if _OWN.is_file():
        return _OWN, _read(_OWN)
    if _PROJECT.is_file():
        found = _read(_PROJECT).get("tool", {}).get("torchfuse", {})
        return _PROJECT, found if isinstance(found, dict) else {}
    return _PROJECT, {}


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"'{path}' cannot be read as TOML: {error}.") from error


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""
