"""The `fastseg` command line: one file per command, which parses arguments and prints results."""
