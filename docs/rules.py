"""The fusion rules, as a table."""

from torchfuse.rules import RULES


def main() -> None:
    """Print a line per rule: its name, whether it runs unasked, and what it does."""
    width = max(len(rule.name) for rule in RULES)
    for rule in RULES:
        when = "only by name" if rule.on_request else "always      "
        print(f"{rule.name:{width}}  {when}  {rule.summary}")


if __name__ == "__main__":
    main()
