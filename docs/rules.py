"""The fusion rules, as a table."""

from torchfuse.exported.rewrites import REWRITES
from torchfuse.rules import RULES


def main() -> None:
    """Print a line per rule: its name, when it runs, and what it does."""
    width = max(len(rule.name) for rule in (*RULES, *REWRITES))
    for rule in RULES:
        when = "only by name" if rule.on_request else "always"
        print(f"{rule.name:{width}}  {when:12}  {rule.summary}")
    for rewrite in REWRITES:
        print(f"{rewrite.name:{width}}  {'in programs':12}  {rewrite.summary}")


if __name__ == "__main__":
    main()
