"""Other ways through a model's code, found by running it."""

from torchfuse.graph.exploring.execution_paths import Way, Ways, called, explore
from torchfuse.graph.exploring.silenced_output import unheard

__all__ = ["Way", "Ways", "called", "explore", "unheard"]
