"""Targets as text: a few lines each."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["listed"]


def listed(targets: Sequence[Mapping[str, Any]]) -> str:
    """Return what `torchfuse targets` shows of the facts of each target."""
    return "\n\n".join(_block(target) for target in targets)


def _block(target: Mapping[str, Any]) -> str:
    version = target["version"] or "not installed"
    lines = [
        f"{' + '.join(target['suffixes'])}: {target['name']}, {version}",
        f"  precisions:  {', '.join(target['precisions'])}",
        f"  sizes:       {target['dynamic']}",
        f"  merges:      {', '.join(target['merges']) or 'nothing'}",
        f"  here:        {_here(target)}",
    ]
    return "\n".join(lines)


def _here(target: Mapping[str, Any]) -> str:
    if target["install"] is not None:
        return str(target["install"])
    return "makes and runs it" if target["obstacle"] is None else f"{target['obstacle']}"
