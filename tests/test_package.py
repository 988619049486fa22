"""The package as a whole: light to import, every verb reachable, no name taken twice."""

import ast
import graphlib
import importlib
import pkgutil
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path

import pytest

import torchfuse

SUBMODULES = [
    module.name
    for module in pkgutil.walk_packages(torchfuse.__path__, "torchfuse.")
    if not module.name.endswith("__main__")
]
SOURCES = {
    ".".join(("torchfuse", *path.relative_to(torchfuse.__path__[0]).with_suffix("").parts)): path
    for path in Path(torchfuse.__path__[0]).rglob("*.py")
}
SOURCES = {name.removesuffix(".__init__"): path for name, path in SOURCES.items()}


def modules_loaded_by(code):
    report = f"{code}\nimport sys; print(*(name for name in sys.modules if '.' not in name))"
    run = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


HELP = "from torchfuse.cli import cli; cli.main({!r}, standalone_mode=False)"


@pytest.mark.parametrize(
    "code",
    [
        "import torchfuse",
        "import torchfuse; dir(torchfuse)",
        HELP.format(["--help"]),
        *(
            HELP.format([command, "--help"])
            for command in ("recipe", "plan", "bench", "compare", "report", "info")
        ),
        "import torchfuse.comparing.comparison, torchfuse.planning",
        "import torchfuse.verifying.equivalence, torchfuse.measuring.timing",
    ],
)
def test_does_not_import_torch(code):
    assert not {"torch", "executorch", "torchao"} & modules_loaded_by(code)


def test_every_submodule_can_be_imported_and_every_verb_stays_a_verb():
    for _ in range(2):
        for name in SUBMODULES:
            importlib.import_module(name)
        for name in torchfuse.__all__:
            assert callable(getattr(torchfuse, name)), name
            assert not isinstance(getattr(torchfuse, name), types.ModuleType), name


def test_no_submodule_has_the_name_of_a_public_name():
    top_level = {name.split(".")[1] for name in SUBMODULES}
    assert not top_level & set(torchfuse.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'torchfuse' has no attribute 'fusee'"):
        torchfuse.fusee  # noqa: B018  # looking it up is the test


def test_every_submodule_says_what_it_is():
    assert not [name for name in SUBMODULES if not importlib.import_module(name).__doc__]


def test_dir_offers_what_is_public_and_nothing_else():
    offered = {name for name in dir(torchfuse) if not name.startswith("__")}
    assert offered == set(torchfuse.__all__)


def imported_by(path):
    """Return what a file of ours imports of ours, but for types alone: in functions as well."""
    found = set()
    todo = [(ast.parse(path.read_text()), False)]
    while todo:
        node, in_function = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += [(child, in_function) for child in node.orelse]
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        modules = {name if name in SOURCES else name.rpartition(".")[0] for name in names}
        # Results are shown by what is imported when they are: str(plan), comparison.to_html().
        found |= {m for m in modules if not (in_function and m.startswith("torchfuse.render."))}
        in_function = in_function or isinstance(node, ast.FunctionDef)
        todo += [(child, in_function) for child in ast.iter_child_nodes(node)]
    return found & set(SOURCES)


def test_no_module_imports_itself_by_way_of_others():
    graphlib.TopologicalSorter({n: imported_by(p) for n, p in SOURCES.items()}).prepare()


@pytest.mark.parametrize("folder", sorted({name.rpartition(".")[0] for name in SOURCES} - {""}))
def test_no_folder_imports_itself_by_way_of_others(folder):
    """What lies in a folder, files and folders, imports in one direction."""

    def beside(name):
        inside = name.removeprefix(f"{folder}.")
        return None if inside == name else inside.partition(".")[0]

    graph = defaultdict(set)
    for name, path in SOURCES.items():
        if beside(name) is not None:
            others = {beside(other) for other in imported_by(path)}
            graph[beside(name)] |= others - {None, beside(name)}
    graphlib.TopologicalSorter(graph).prepare()


def shared(names):
    """Return the names that more than one module has or holds, each with these modules."""
    held = defaultdict(list)
    for name, module in names:
        held[name].append(module)
    return {name: modules for name, modules in held.items() if len(modules) > 1}


def test_no_two_modules_share_a_name():
    own = [name for name in SOURCES if not name.endswith("__main__")]
    assert shared((name.rpartition(".")[2], name) for name in own) == {}


def test_no_two_classes_of_ours_share_a_name():
    classes = [
        (node.name, name)
        for name, path in SOURCES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert shared(classes) == {}
