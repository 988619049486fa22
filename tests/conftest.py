"""Model files that several tests run, and one thread to run them in."""

import logging
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from torchfuse.artifacts import write_atomically
from torchfuse.cases import Case
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.lowering.capture import capture
from torchfuse.targets.executorch.xnnpack import lower
from torchfuse.targets.sealing import seal_pte, seal_zip
from torchfuse.targets.torchscript import scripting

# A shell that starts the tests in the background has Ctrl-C ignored, and so would have all that
# they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Two threads on two busy cores take ten times as long for models this small.
torch.set_num_threads(1)


class Third(nn.Module):
    """A third of x, nearly."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.333333


class Sum(nn.Module):
    """The sum of both inputs' elements."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.sum() + y.sum()


class Root(nn.Module):
    """NaN on every input that is positive."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (-x).sqrt()


class Constant(nn.Module):
    """Takes nothing."""

    def forward(self) -> torch.Tensor:
        return torch.arange(3)


class Fixed(nn.Module):
    """Takes 2×7 and nothing else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(torch.ones(2, 2), x) + torch.ones(2, 7)


class Bundled(Third):
    """A third of x, with two inputs saved along, as torch.utils.bundled_inputs does."""

    @torch.jit.export
    def get_all_bundled_inputs(self) -> list[tuple[torch.Tensor]]:
        return [(torch.ones(2, 3),), (torch.full((1, 2), 2.0),)]


def _logging_state() -> tuple[object, ...]:
    logger = logging.getLogger("torchao")
    heard = logger.isEnabledFor(logging.WARNING)
    return (
        logging.root.manager.disable,
        heard,
        logger.propagate,
        logger.disabled,
        logging.root.level,
    )


@pytest.fixture(autouse=True)
def _logging_is_left_as_it_was() -> Iterator[None]:
    """What silences the process for a while has to end: later tests would blame another."""
    before = _logging_state()
    yield
    assert _logging_state() == before


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The path of a model file by its name: third.pt, third.ptl, third.pte, sum.pt, root.pt, ..."""
    folder = tmp_path_factory.mktemp("models")
    models = {
        "third": Third(),
        "sum": Sum(),
        "root": Root(),
        "constant": Constant(),
        "fixed": Fixed(),
        "bundled": Bundled(),
    }
    with known_warnings_ignored():
        scripted = {name: torch.jit.script(model) for name, model in models.items()}

    def made(name: str) -> str:
        path = folder / name
        if not path.exists():
            form = path.suffix[1:]
            # Sealed, since the first load of any other file starts a process.
            if form == "pte":
                case = Case((torch.ones(1, 3, 4, 4),))
                lowered = lower(capture(models[path.stem], case))
                data = seal_pte(lowered.program, {"signature": dict(lowered.signature)})
            else:
                data = seal_zip(scripting.serialize(scripted[path.stem], form), {})
            write_atomically(path, data)
        return str(path)

    return made
