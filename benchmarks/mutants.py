"""How many planted faults the tests find: in the proof, the conditions, undo, and the statistics.

    python benchmarks/mutants.py --per-file 25 --json mutants.json

Each mutant is one change of one expression in one file: a comparison, a condition that is always
or never true, a constant, an operator, a call that is left out. The tests of that file run in a
process of their own, up to the first failure; a mutant that fails none has survived. Of each file a
random sample is taken, the same at every run.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEVER_WRONG = tuple(
    f"tests/never_wrong/test_{name}.py"
    for name in ("order", "inputs", "dtypes", "sharing", "parametrized", "batch_norms", "layers")
)
PROOF = ("tests/fusing/proving", "tests/test_proof.py")
PROGRAMS = (
    "tests/fusing/programs/test_program_proving.py",
    *(
        f"tests/fusing/programs/test_program_fusing.py::test_{name}"
        for name in (
            "a_program_that_amplifies_rounding_is_fused",
            "a_pair_that_amplifies_rounding_is_judged_in_float64",
            "an_amplifying_program_that_runs_in_float32_alone_keeps_what_its_pairs_show",
            "a_small_error_that_only_the_whole_program_shows_is_refused",
            "one_percent_is_seen_in_half_precision_too",
            "a_fold_that_is_one_percent_off_is_rolled_back",
        )
    ),
)
BLOCKS = "tests/fusing/blocks/test_planned.py"
# The files that are changed, each with the tests that are to notice.
TARGETS: dict[str, tuple[str, ...]] = {
    "fusing/proving/whole.py": PROOF,
    "fusing/proving/pairs.py": (*PROOF, "tests/never_wrong/test_functional.py"),
    "fusing/module_proving.py": (
        *PROOF,
        "tests/never_wrong/test_functional.py",
    ),
    "fusing/proving/variations.py": (*PROOF, "tests/never_wrong/test_inputs.py"),
    "fusing/programs/program_proving.py": PROGRAMS,
    "conditions/exactness.py": (
        "tests/conditions/test_exactness.py",
        *NEVER_WRONG,
        "tests/never_wrong/test_other_paths.py",
    ),
    "conditions/unshared.py": (
        "tests/conditions/test_unshared.py",
        *NEVER_WRONG,
        "tests/never_wrong/test_readers.py",
    ),
    "isolation/snapshot.py": (
        "tests/isolation/test_snapshot.py",
        "tests/never_wrong/test_state_outside.py",
        "tests/never_wrong/test_no_trace.py",
        "tests/verifying/test_outputs.py",
        "tests/graph/test_recording.py",
    ),
    "fusing/module_edits.py": (
        "tests/fusing/test_module_edits.py",
        "tests/graph/test_retracing.py",
        "tests/test_same_model_out.py",
    ),
    "fusing/module_host.py": (
        "tests/test_proof.py",
        "tests/test_same_model_out.py",
        f"{BLOCKS}::test_unfused_it_is_bit_for_bit_what_it_was",
    ),
    "fusing/checkpoints.py": (
        "tests/test_same_model_out.py",
        f"{BLOCKS}::test_the_key_map_says_where_each_key_went",
    ),
    "stats.py": ("tests/test_stats.py",),
}

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One change, and what became of it."""

    file: str
    line: int
    change: str
    killed: bool
    how: str  # "failed", "timed out"; "" if it survived


def main() -> None:
    """Run the mutants, print those that survive, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-file", type=int, default=25)
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first of each sample")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: list[Mutant] = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source)
        for file, tests in TARGETS.items():
            if options.only in file:
                here = [name for name in tests if (ROOT / name.partition("::")[0]).exists()]
                found += _of_file(source, file, here, options.per_file, options.skip)
                if options.json:
                    options.json.write_text(json.dumps([asdict(m) for m in found], indent=2))
    killed = sum(mutant.killed for mutant in found)
    print(f"{killed} of {len(found)} mutants killed.")


def _of_file(
    source: Path, file: str, tests: list[str], per_file: int, skip: int
) -> Iterator[Mutant]:
    path = source / "torchfuse" / file
    original = path.read_text()
    count = len(list(_sites(ast.parse(original))))
    order = list(range(count))
    random.Random(0).shuffle(order)
    if _run(source, tests, timeout_s=300, note=source / "modules"):
        sys.exit(f"The tests of {file} fail without a mutant: {', '.join(tests)}.")
    _import_all((source / "modules").read_text().split())
    began = time.perf_counter()
    assert not _run(source, tests, timeout_s=300)
    allowed_s = 3 * (time.perf_counter() - began) + 10
    killed = 0
    chosen = order[skip : skip + per_file]
    for site in chosen:
        tree = ast.parse(original)
        line, change, apply = list(_sites(tree))[site]
        apply()
        path.write_text(ast.unparse(ast.fix_missing_locations(tree)))
        how = _run(source, tests, timeout_s=allowed_s)
        killed += bool(how)
        if not how:
            print(f"survived: {file}:{line}: {change}", flush=True)
        yield Mutant(file, line, change, bool(how), how)
    path.write_text(original)
    print(f"{file}: {killed} of {len(chosen)} killed; there are {count}.", flush=True)


def _import_all(modules: list[str]) -> None:
    """Import what the tests import, but for the package itself: once, for all mutants."""
    for name in modules:
        # (torch.export only half imported, or the compiler, would change what the tests do)
        if name.startswith(("numpy.", "scipy.", "sympy.", "rich.", "torch.fx.", "torch.nn.")):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def _run(source: Path, tests: list[str], *, timeout_s: float, note: Path | None = None) -> str:
    """Return how the tests fail in a process of their own; `note` is told what they import."""
    child = os.fork()
    if child == 0:
        _test(source, tests, note)
    deadline = time.perf_counter() + timeout_s
    while time.perf_counter() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return "failed" if status else ""
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timed out"


def _test(source: Path, tests: list[str], note: Path | None) -> None:
    import pytest

    os.chdir(ROOT)
    sys.path.insert(0, str(source))
    sys.dont_write_bytecode = True  # two mutants of one second would share it
    out = os.open(os.devnull, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code: int = 1
    try:
        before = {*sys.modules}
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
        if note is not None:
            files = {n: getattr(m, "__file__", None) or "" for n, m in sys.modules.items()}
            theirs = [n for n, file in files.items() if str(ROOT / "tests") not in file]
            note.write_text("\n".join(name for name in theirs if name not in before))
    finally:
        os._exit(code)


# ── the changes ──────────────────────────────────────────────────────────────────────────────────

Site = tuple[int, str, Callable[[], None]]


def _sites(node: ast.AST) -> Iterator[Site]:
    """Yield the line, the change in words, and what makes it, for every place of the tree."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue

            def put(
                new: ast.AST, name: str = name, index: int = index, value: object = value
            ) -> None:
                if isinstance(value, list):
                    value[index] = new
                else:
                    setattr(node, name, new)

            if isinstance(child, ast.Assign) and "__all__" in ast.unparse(child.targets[0]):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            yield from _changes(child, put)
            yield from _sites(child)


def _changes(node: ast.AST, put: Callable[[ast.AST], None]) -> Iterator[Site]:
    line = getattr(node, "lineno", 0)

    def site(change: str, new: ast.AST) -> Site:
        return line, f"{change}: {ast.unparse(node).splitlines()[0][:90]}", lambda: put(new)

    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        other = COMPARISONS[type(node.ops[0])]
        new = ast.Compare(node.left, [other(), *node.ops[1:]], node.comparators)
        yield site(f"{type(node.ops[0]).__name__} → {other.__name__}", new)
    elif isinstance(node, ast.BoolOp):
        flipped = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield site("and ↔ or", ast.BoolOp(flipped, node.values))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield site("without not", node.operand)
    elif isinstance(node, (ast.If, ast.IfExp)):
        for value in (False, True):
            new_ = ast.copy_location(type(node)(**dict(ast.iter_fields(node))), node)
            new_.test = ast.Constant(value)
            yield site(f"if {value}", new_)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield site("another constant", ast.Constant(not node.value))
        elif isinstance(node.value, int):
            yield site("another constant", ast.Constant(node.value + 1))
        elif isinstance(node.value, float):
            yield site("another constant", ast.Constant(node.value * 2 or 1.0))
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        operator = OPERATORS[type(node.op)]
        yield site(
            f"{type(node.op).__name__} → {operator.__name__}",
            ast.BinOp(node.left, operator(), node.right),
        )
    elif isinstance(node, ast.AugAssign) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield site("left out", ast.Pass())
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield site(f"{node.id} → {NAMES[node.id]}", ast.Name(NAMES[node.id], node.ctx))
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield site("without its if", ast.comprehension(node.target, node.iter, [], node.is_async))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    import numpy  # noqa: F401 - shared by the processes of the mutants
    import torch  # noqa: F401

    main()
