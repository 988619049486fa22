"""The fusion rules, as a table: those of modules, or with `programs` what is merged beyond."""

import sys

from torchfuse.fusing.programs.rewrites import REWRITES
from torchfuse.rules import RULES


def main(which: str) -> None:
    """Print a line per rule: its name, and what it does; an example in programs."""
    if which == "programs":
        width = max(len(rule.name) for rule in REWRITES)
        for rewrite in REWRITES:
            print(f"{rewrite.name:{width}}  {rewrite.summary}")
            print(f"{'':{width}}    {rewrite.example}")
        return
    width = max(len(rule.name) for rule in RULES)
    for rule in RULES:
        print(f"{rule.name:{width}}  {rule.summary}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
