"""Other paths through a model's code, found by running it."""

from torchfuse.graph.exploring.execution_paths import ExecutionPath, ExecutionPaths, called, explore
from torchfuse.graph.exploring.silenced_output import output_silenced

__all__ = ["ExecutionPath", "ExecutionPaths", "called", "explore", "output_silenced"]
