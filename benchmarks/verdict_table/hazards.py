"""The verdicts on what the tests fuse: pytest runs them, and each model is noted as it comes by."""

import contextlib
import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import torchfuse
from verdict_table.of_model import Verdicts, verdicts_of

TESTS = Path(__file__).resolve().parents[2] / "tests"
PLACES = (  # not test_proof.py, which breaks torchfuse on purpose
    *("never_wrong", "rules", "conditions"),
    *("graph/test_parametrized.py", "test_same_model_out.py", "test_execution_paths.py"),
    "test_fx_fusion_ports.py",
)


def files() -> list[str]:
    """Return the files of tests whose models are in the table, relative to tests/."""
    found = [
        path
        for place in PLACES
        for path in (
            [TESTS / place] if place.endswith(".py") else (TESTS / place).glob("test_*.py")
        )
    ]
    return sorted(path.relative_to(TESTS).as_posix() for path in found)


def hazards(file: str) -> tuple[list[Verdicts], str]:
    """Return the verdicts on every model that the tests of `file` plan or fuse, and what failed.

    A model is named by its test: "rules/test_conv_bn.py::test_…[…]", with " (2)" from the second.
    """
    noting = _Noting()
    printed = io.StringIO()
    arguments = [str(TESTS / file), "--rootdir", str(TESTS.parent), "-q", "--no-header"]
    with contextlib.redirect_stdout(printed), noting.in_place():
        status = pytest.main([*arguments, "-p", "no:cacheprovider"], plugins=[noting])
    ran = status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    return noting.found, "" if ran else printed.getvalue()


class _Noting:
    """A plugin of pytest: stands in for torchfuse's verbs while a test runs."""

    def __init__(self) -> None:
        self.found: list[Verdicts] = []
        self.test = ""
        self.seen: list[tuple[Any, Any, Any]] = []  # kept alive, so that no two share an id
        self.busy = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_make_collect_report(self) -> None:
        """Let the models that a file makes when it is imported be the same every time."""
        _seed()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Begin a test, with the same random numbers every time."""
        _seed()
        self.test = item.nodeid.removeprefix("tests/")
        self.seen = []

    def pytest_runtest_teardown(self) -> None:
        """End it: what fixtures of a wider scope fuse is not its own."""
        self.test = ""

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Notice the calls of `torchfuse.fuse` and `torchfuse.plan`."""
        originals = {name: getattr(torchfuse, name) for name in ("fuse", "plan")}
        for name, original in originals.items():
            setattr(torchfuse, name, self._noticing(original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(torchfuse, name, original)

    def _noticing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def noticed(model: Any, inputs: Any, **options: Any) -> Any:
            rules = options.get("rules")
            if self.busy:
                return original(model, inputs, **options)
            self.busy = True
            try:
                if options.get("inplace"):  # afterwards it is another model
                    self._note(model, inputs, rules)
                    return original(model, inputs, **options)
                try:
                    return original(model, inputs, **options)
                finally:  # not before: what a model counts, the test counts on
                    self._note(model, inputs, rules)
            finally:
                self.busy = False

        return noticed

    def _note(self, model: Any, inputs: Any, rules: Any) -> None:
        if not self.test or any(
            model is known and inputs is given and rules == asked
            for known, given, asked in self.seen
        ):
            return
        self.seen.append((model, inputs, rules))
        count = len(self.seen)
        name = self.test if count == 1 else f"{self.test} ({count})"
        with torch.random.fork_rng(devices=[]):
            self.found.append(verdicts_of(name, model, inputs, rules=rules))


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
