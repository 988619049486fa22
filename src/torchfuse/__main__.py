"""`python -m torchfuse` is the command `torchfuse`."""

from torchfuse.cli import main

main()
