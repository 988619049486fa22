"""The result of comparing variants of one model: plain data, no torch."""

from dataclasses import dataclass

from torchfuse.delegation import Delegation
from torchfuse.equivalence import Equivalence
from torchfuse.noise import Caution
from torchfuse.stats import Ratio
from torchfuse.timing import Measurement, ratio

__all__ = ["FOLDED", "NOT_FUSED", "Comparison", "Row", "gain"]

# Names of variants that every comparison has.
NOT_FUSED = "not fused"
FOLDED = "folded by lowering"  # ExecuTorch folds batch norms, whether the model was fused or not


_FORMAT = "torchfuse-comparison-1"


@dataclass(frozen=True)
class Row:
    """One variant of the model on one target."""

    variant: str  # NOT_FUSED, FOLDED, or the name of a fused model
    target: str  # "eager", "channels_last", or the artifact's suffix
    precision: str  # "fp32", "fp16", "int8"
    latency: Measurement
    speedup: Ratio  # the baseline's latency over this one's; above 1 is faster
    size_bytes: int | None  # of the artifact; None: there is no file
    difference: Equivalence  # from the baseline's outputs, on the example inputs
    accuracy: float | None  # 0 to 1; None: not evaluated
    delegation: Delegation | None  # None: the target has no delegate


@dataclass(frozen=True)
class Comparison:
    """The rows of one model, the baseline first; all were timed in the same rounds."""

    model: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]  # what was left out and why, what is not delegated: sentences
    architecture: str | None = None  # of the processor: "x86_64", "aarch64"

    @property
    def baseline(self) -> Row:
        """The non-fused fp32 eager model."""
        return self.rows[0]

    @property
    def cautions(self) -> tuple[Caution, ...]:
        """What makes the times less trustworthy, each once."""
        return tuple(dict.fromkeys(c for row in self.rows for c in row.latency.cautions))

    def find(self, variant: str, target: str, precision: str) -> Row | None:
        """Return the row of that name, or None where that variant was left out."""
        wanted = (variant, target, precision)
        rows = (row for row in self.rows if (row.variant, row.target, row.precision) == wanted)
        return next(rows, None)

    def __str__(self) -> str:
        """What `torchfuse compare` prints: a table, what was bought, and what to know of both."""
        from torchfuse.render.comparison import text

        return text(self)

    def to_markdown(self) -> str:
        """The same as Markdown."""
        from torchfuse.render.comparison import markdown

        return markdown(self)

    def to_json(self) -> str:
        """The comparison as JSON text, with every sample; `from_json` gives back an equal one."""
        from torchfuse.render.json import to_json

        return to_json(self, _FORMAT)

    @classmethod
    def from_json(cls, text: str) -> "Comparison":
        """The comparison that `to_json` wrote.

        Raises:
            InputError: it did not write this text.
        """
        from torchfuse.render.json import from_json

        return from_json(cls, text, _FORMAT)


def gain(slower: Row, faster: Row) -> Ratio:
    """Return how much faster the second row is than the first."""
    return ratio(slower.latency, faster.latency)
