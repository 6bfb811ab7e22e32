"""The `fastseg` command. Each subcommand is a module; errors are printed in one line; exit code 2 means bad input."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .terminal import silence

COMMANDS = {
    "doctor": "versions, the GPU, and the backend that calls would take and why",
    "verify": "check every operator against torch in float64",
    "demo": "swap fused layers into a plain SegNet, train it, check it against torch",
    "train": "train a network on a folder of images and masks",
    "segment": "predict the classes of an image's pixels with a trained checkpoint",
    "swap": "swap fused layers into a model of yours, check it and time it",
    "inspect": "bytes moved and compiled code, without a GPU",
    "bench": "time the operators and compare with torch's",
}
"""The help of each subcommand. Its module has configure(parser), and main(args) that returns the exit code."""

LONGEST = 800
"""How many characters of an error message are printed."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="fastseg",
        description="Fused Triton kernels for image segmentation in PyTorch.",
        epilog="examples:\n  fastseg doctor\n  fastseg verify --quick\n  fastseg demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="store_true", help="print the version and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        importlib.import_module(f"fastseg.commands.{name}").configure(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after `fastseg`. Default: those of the process.

    Returns:
        int: the exit code: 0 for success, 1 if a check failed or for a bug, 2 for bad input, 130 after Ctrl-C,
        143 and 129 after the signals SIGTERM and SIGHUP, 141 if the reader of the output was gone before the result.
    """
    top = parser()
    args = top.parse_args(arguments)
    if args.version:
        from ..version import __version__

        print(__version__)
        return 0
    if args.command is None:
        top.print_help()
        return 2
    code = 128 + 13  # as of a process that SIGPIPE ended, if the reader of the output is gone before the result
    try:
        code = importlib.import_module(f"fastseg.commands.{args.command}").main(args)
        sys.stdout.flush()  # here, where a reader that is gone can be handled
        return code
    except BrokenPipeError:
        silence()
        return code
    except Exception as error:
        if args.debug:
            raise
        expected = isinstance(error, (OSError, ValueError, RuntimeError, ImportError))
        message = str(error) if expected else f"{type(error).__name__}: {error} (a bug; --debug shows the traceback)"
        if isinstance(error, OSError) and error.filename is not None:
            message = f"{error.filename}: {error.strerror}"
        print(f"fastseg {args.command}: error: {one_line(message)}", file=sys.stderr)
        return 2 if expected else 1
    except KeyboardInterrupt:
        if args.debug:
            raise
        print(f"fastseg {args.command}: interrupted", file=sys.stderr)
        return 130


def one_line(message: str) -> str:
    """A message without line breaks, shortened: torch's can fill a screen."""
    text = " ".join(message.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... (--debug shows all)"


if __name__ == "__main__":
    sys.exit(main())
