"""What is the same for every command: what it ends with (docs/ci.md says it to users), and `-`."""

__all__ = ["ERROR", "FINE", "GATE", "INTERRUPTED", "NOISE", "STDOUT"]

FINE = 0
GATE = (
    1  # a gate that was asked for failed: --fail-if, --fail-if-slower, --fail-on-skip, --max-drop
)
ERROR = 2  # usage, or something that could not be done
NOISE = 3  # figures that are not to be trusted, with --fail-on-noise
INTERRUPTED = 130  # Ctrl-C, SIGTERM or SIGHUP

STDOUT = "-"  # as the name of a file: printed there, in place of the text
