"""Other ways through a model's code, found by running it."""

from torchfuse.exploring.unheard import unheard
from torchfuse.exploring.ways import Way, Ways, explore

__all__ = ["Way", "Ways", "explore", "unheard"]
