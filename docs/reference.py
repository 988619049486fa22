"""docs/reference.md: every public name, from its docstring and its signature, by griffe2md."""

import linecache
import re
import subprocess
import sys
from pathlib import Path

import griffe
import griffe2md

import torchfuse

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference.md"

_CONFIG: griffe2md.ConfigDict = {
    **griffe2md.default_config,
    "heading_level": 3,
    "show_root_full_path": False,
    "show_root_members_full_path": False,
    "show_object_full_path": False,
    "show_bases": False,
    "members_order": "source",
    "inherited_members": False,
    "summary": False,
}
_HEAD = """# Reference

Every public name of `torchfuse`, written by `python docs/generate.py` from the docstrings. The
command line says its own: `torchfuse COMMAND --help`.
"""
_GROUPS = {
    "Verbs": lambda found: found.is_function,
    "What they give back, and take": lambda found: (
        found.is_class and not found.name.endswith(("Error", "Warning"))
    ),
    "Errors and warnings": lambda found: found.name.endswith(("Error", "Warning")),
}


def reference() -> str:
    """Return the page."""
    package = griffe.load("torchfuse", search_paths=[ROOT / "src"], docstring_parser="google")
    found = [package[name].final_target for name in sorted(torchfuse.__all__, key=str.lower)]
    parts = [_HEAD]
    for title, belongs in _GROUPS.items():
        parts.append(f"## {title}\n")
        for entry in filter(belongs, found):
            _describe_fields(entry)
            parts.append(griffe2md.render_object_docs(entry, _CONFIG).strip() + "\n")
    # Links to what has no heading on this page lead nowhere.
    text = re.sub(r"\[([^\[\]]+)\]\(#[^)]*\)", r"\1", "\n".join(parts))
    # As Python has it, so that long signatures are broken into lines; not of classes.
    text = re.sub(r"(?<=^```python\n)([a-z_]\w*\(.*\))$", r"def \1: ...", text, flags=re.MULTILINE)
    ruff = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(PAGE)]
    return subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout


def _describe_fields(entry: griffe.Object) -> None:
    """Make the comment beside a field, which has its unit or shape, its description."""
    for field in entry.members.values():
        if field.is_attribute and not field.is_alias and field.docstring is None and field.lineno:
            line = linecache.getline(str(field.filepath), field.lineno)
            comment = line.rpartition("  # ")[2].strip() if "  # " in line else ""
            field.docstring = griffe.Docstring(comment, parent=field)
