"""`torchfuse info`: what a file or a model is, without measuring anything."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchfuse import model_source
from torchfuse.artifacts import check_destination, write_atomically
from torchfuse.commands.model_options import model_options
from torchfuse.commands.status import STDOUT
from torchfuse.errors import InputError
from torchfuse.units import decibels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torchfuse.cases import Case

__all__ = ["command"]


@click.command("info", short_help="What a file or a model is.")
@model_options
@click.option("--json", "json_file", metavar="FILE", help="Save it as JSON; '-' prints it instead.")
def command(
    model: str, inputs: tuple[str, ...], weights: Path | None, json_file: str | None
) -> None:
    """Show what MODEL takes, returns and holds.

    MODEL is a file of any target that torchfuse or another tool made, path/to/file.py:callable,
    package.module:callable, timm:NAME, or an exported program file.pt2. A file is checked, and not
    run; a model is run once on its example.
    """
    if json_file not in (None, STDOUT):
        check_destination(str(json_file))
    path = Path(model)
    is_file = path.suffix and path.suffix != ".pt2" and ":" not in path.name
    if is_file and (inputs or weights is not None):
        raise InputError(f"--input and --weights are for a model; '{model}' is a file.")
    found = _of_file(path) if is_file else _of_model(model, inputs, weights)
    from torchfuse.serialization import to_json

    if json_file == STDOUT:
        click.echo(to_json(found))
        return
    for name, value in found.items():
        if value is not None:
            click.echo(f"{name.replace('_', ' ')}: {_shown(name, value)}")
    if json_file is not None:
        write_atomically(json_file, (to_json(found) + "\n").encode())


def _of_file(path: Path) -> dict[str, Any]:
    from torchfuse.targets.opening import check

    file = check(path)
    sealed = dict(file.metadata or {})
    operators = sealed.get("operators")
    return {
        "file": str(path),
        "format": file.format,
        "precision": sealed.get("precision"),
        "size_bytes": len(file.data),
        "sha256": hashlib.sha256(file.data).hexdigest(),
        "checksum": "in the file, and right" if sealed else "none in the file",
        "inputs": sealed.get("inputs"),
        "preprocessing": sealed.get("preprocessing"),
        "delegates": sealed.get("backends") or None,
        "operators_outside": operators or None,
        "precision_by_layer": sealed.get("layers"),
        "calibrated_on": sealed.get("calibrated_on"),
        "verified": sealed.get("verified"),
        "made_by": {
            name: sealed[name] for name in ("torchfuse", "torch", "executorch") if name in sealed
        }
        or None,
    }


def _of_model(text: str, inputs: tuple[str, ...], weights: Path | None) -> dict[str, Any]:
    loaded = model_source.load(text, inputs, weights)
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from torchfuse.cases import cases
    from torchfuse.exporting.file_inputs import described
    from torchfuse.verifying.outputs import run

    network = loaded.module
    case = cases(loaded.example_inputs)[0]
    counter = FlopCounterMode(display=False)
    with counter:
        outputs = run(network, case)
    kinds = Counter(
        _operators(network)
        if loaded.exported
        else (type(m).__name__ for m in network.modules() if not any(True for _ in m.children()))
    )
    return {
        "model": text,
        **(_as_file(Path(text)) if loaded.exported else {"class": type(network).__name__}),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "parameter_bytes": sum(p.numel() * p.element_size() for p in network.parameters()),
        "macs": counter.get_total_flops() // 2,
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in network.parameters()}),
        "inputs": described(case),
        "outputs": {
            name: f"{'×'.join(map(str, leaf.shape))} {str(leaf.dtype).removeprefix('torch.')}"
            for name, leaf in outputs.items()
            if isinstance(leaf, torch.Tensor)
        },
        "layers": dict(sorted(kinds.items(), key=lambda entry: (-entry[1], entry[0]))),
    }


def _as_file(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _operators(graph: Any) -> Iterator[str]:
    """Yield the operators of an exported program's module: it has no modules of its own."""
    for node in graph.graph.nodes:
        if node.op == "call_function":
            yield str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")


def _shown(name: str, value: Any) -> str:
    if name == "inputs":
        return _inputs(value)
    if name == "verified":
        return _verified(value)
    if name == "precision_by_layer":
        return _precisions(value)
    if isinstance(value, dict):
        pairs = (f"{key} {_shown('', item)}" for key, item in value.items())
        return ", ".join(pairs)
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and name != "format" else str(value)


def _precisions(kept: Mapping[str, Any]) -> str:
    names = ", ".join(name or "the model itself" for name in kept.get("in_float", ()))
    in_float = f"{kept['float']} in float" + (f": {names}" if names else "")
    return f"{kept['int8']} layers in int8, {in_float if kept['float'] else 'none in float'}"


def _verified(kept: Mapping[str, Any]) -> str:
    found = "equal" if kept["sqnr_db"] is None else f"at {decibels(kept['sqnr_db'])}"
    return f"outputs {found}, against {kept['against']} on {kept['on']}"


def _inputs(kept: Mapping[str, Any]) -> str:
    from torchfuse.commands.bench_inputs import shown
    from torchfuse.exporting.file_inputs import ones_like

    case: Case = ones_like(kept)
    return shown(case)
