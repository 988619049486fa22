"""The result of comparing variants of one model: plain data, no torch."""

from dataclasses import dataclass, field

from torchfuse import serialization
from torchfuse.delegation import Delegation
from torchfuse.devices.facts import DeviceFacts
from torchfuse.measuring.cautions import Caution
from torchfuse.measuring.timing import Measurement, ratio
from torchfuse.operator_times import Profile
from torchfuse.planning import FusionPlan
from torchfuse.stats import Ratio, Share
from torchfuse.verifying.equivalence import Equivalence

__all__ = [
    "FOLDED",
    "LOCAL",
    "NOT_FUSED",
    "Answers",
    "ChangedAnswer",
    "Comparison",
    "LayerNoise",
    "Operation",
    "Row",
    "gain",
]

# Names of variants that every comparison has.
NOT_FUSED = "not fused"
FOLDED = "folded by lowering"  # the target folds batch norms, whether the model was fused or not

LOCAL = "local"  # this machine, as --device calls it

_FORMAT = "torchfuse-comparison-2"


@dataclass(frozen=True)
class ChangedAnswer:
    """A validation sample whose class is another than the baseline's."""

    sample: str  # the picture's path, or "sample 3"
    before: int  # the baseline's class
    after: int
    label: int | None  # None: unknown


@dataclass(frozen=True)
class Answers:
    """What a row returned on the validation data, beside what the baseline did."""

    samples: int
    sqnr_db: float | None  # over all outputs; inf if equal; None: they could not be compared
    agreement: Share | None  # the same class as the baseline's; None: the outputs are no scores
    accuracy: Share | None  # top-1; None: no labels
    changed: tuple[ChangedAnswer, ...]


@dataclass(frozen=True)
class Row:
    """One variant of the model on one target and device."""

    variant: str  # NOT_FUSED, FOLDED, or the name of a fused model
    target: str  # "eager", "channels_last", or the artifact's suffix
    precision: str  # "fp32", "fp16", "int8"
    latency: Measurement
    speedup: Ratio  # the latency of its device's first row over this one's; above 1 is faster
    size_bytes: int | None  # of the artifact; None: there is no file
    difference: Equivalence  # from the baseline's outputs, on the example inputs
    accuracy: Share | None  # 0 to 1, of `evaluate` or top-1; None: not evaluated
    delegation: Delegation | None  # None: the target has no delegate
    answers: Answers | None = None  # None: no validation data
    device: str = LOCAL


@dataclass(frozen=True)
class LayerNoise:
    """How far one layer's output in int8 is from the float one's, on calibration data."""

    module: str  # path of the module that called it
    operator: str
    sqnr_db: float  # everything before it in int8 too
    own_sqnr_db: float | None  # given float inputs: its own share
    cause: str  # in words; "" if nothing stands out


@dataclass(frozen=True)
class Operation:
    """One call of the model's graph, as it ran on the first example."""

    kind: str  # "conv", "batch_norm", "add" …
    module: str  # path of the module that called it; "" is the model itself
    sizes: tuple[int, ...]  # of its first result
    inputs: tuple[int, ...]  # indices of the calls whose results it reads
    time_s: float | None = None  # median, of the module's own call, in eager mode; None: unknown


@dataclass(frozen=True)
class Comparison:
    """The rows of one model, the baseline first; those of one device were timed in one go."""

    model: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]  # what was left out and why, what is not delegated: sentences
    architecture: str | None = None  # of the processor: "x86_64", "aarch64"
    inputs: str = ""  # the first case, in words: "forward(1×3×224×224)"
    validation: str | None = None  # the data that answers are on, in words; None: there is none
    accuracy_of: str | None = None  # what accuracy is: "top-1", or the name of `evaluate`
    devices: tuple[DeviceFacts, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)  # by package
    command: str | None = None  # that makes it again, in a shell; None: it was made by Python code
    plan: FusionPlan | None = None  # of the model on its own; None: only given models were compared
    layers: tuple[LayerNoise, ...] = ()  # of the int8 variant, worst first
    in_int8: tuple[str, ...] = ()  # paths of the modules that compute in int8
    before: tuple[Operation, ...] = ()  # the graph of the model
    after: tuple[Operation, ...] = ()  # of the fused one
    digest: str | None = None  # of the model, data, example, options and versions; None: unknown
    unfinished: str | None = None  # what was still to be done when it was interrupted
    profiles: tuple[Profile, ...] = ()  # where the time of a run goes, by operator, on this machine

    @property
    def baseline(self) -> Row:
        """The non-fused fp32 eager model."""
        return self.rows[0]

    @property
    def cautions(self) -> tuple[Caution, ...]:
        """What makes the times less trustworthy, each once."""
        return tuple(dict.fromkeys(c for row in self.rows for c in row.latency.cautions))

    def find(self, variant: str, target: str, precision: str, device: str = LOCAL) -> Row | None:
        """Return the row of that name, or None where that variant was left out."""
        wanted = (variant, target, precision, device)
        rows = (r for r in self.rows if (r.variant, r.target, r.precision, r.device) == wanted)
        return next(rows, None)

    def __str__(self) -> str:
        """What `torchfuse compare` prints: a table, what was bought, and what to know of both."""
        from torchfuse.render.comparison_text import text

        return text(self)

    def to_markdown(self) -> str:
        """The same as Markdown."""
        from torchfuse.render.comparison_text import markdown

        return markdown(self)

    def to_html(self) -> str:
        """The report: one HTML file that needs no network.

        Raises:
            UnsupportedError: what draws its charts is not installed: torchfuse[report].
        """
        from torchfuse.render.html import page

        return page(self)

    def _repr_html_(self) -> str:
        from torchfuse.render.html import fragment

        return fragment(self)

    def to_json(self) -> str:
        """The comparison as JSON text, with every sample; `from_json` gives back an equal one."""
        return serialization.to_json(self, _FORMAT)

    @classmethod
    def from_json(cls, text: str) -> "Comparison":
        """The comparison that `to_json` wrote.

        Raises:
            InputError: it did not write this text.
        """
        return serialization.from_json(cls, text, _FORMAT)


def gain(slower: Row, faster: Row) -> Ratio:
    """Return how much faster the second row is than the first."""
    return ratio(slower.latency, faster.latency)
