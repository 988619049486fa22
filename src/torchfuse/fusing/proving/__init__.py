"""One proof of what fusing changes, for modules and for exported programs.

Each pair by itself, on what the original computes; then the whole, on the same inputs.
"""

from torchfuse.fusing.proving.pairs import PairDifference, decided, unwrapped
from torchfuse.fusing.proving.variations import other_inputs, variations
from torchfuse.fusing.proving.whole import Trial, Whole, outputs_of, prove

__all__ = [
    "PairDifference",
    "Trial",
    "Whole",
    "decided",
    "other_inputs",
    "outputs_of",
    "prove",
    "unwrapped",
    "variations",
]
