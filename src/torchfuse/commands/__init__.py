"""The command line's subcommands, one file each; none imports torch before it runs."""
