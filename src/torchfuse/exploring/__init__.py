"""Other ways through a model's code, found by running it."""

from torchfuse.exploring.unheard import unheard
from torchfuse.exploring.ways import Way, Ways, called, explore

__all__ = ["Way", "Ways", "called", "explore", "unheard"]
