"""The `fastseg` command: one subcommand a module, errors as one sentence, exit code 2 for bad input."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {  # name: (module with configure(parser) and main(args) -> exit code, one line of help)
    "doctor": ("doctor", "versions, the GPU, and which backend would run and why"),
    "verify": ("verify", "check every operator against torch in float64"),
    "demo": ("demo", "swap fused layers into a plain SegNet, train it, check it against torch"),
    "train": ("train", "train a network on a folder of pictures and masks"),
    "segment": ("segment", "label the pixels of a picture with a trained checkpoint"),
    "swap": ("swap", "swap into a model of yours, check and time it"),
    "inspect": ("inspect", "bytes moved and compiled code, without a GPU"),
    "bench": ("bench", "time the operators beside torch's"),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="fastseg",
        description="Fused Triton kernels for image segmentation in PyTorch.",
        epilog="examples:\n  fastseg doctor\n  fastseg verify --quick\n  fastseg demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="store_true", help="print the version and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        importlib.import_module(f"fastseg.commands.{module}").configure(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0 fine, 1 a check failed, 2 bad input, 130 interrupted."""
    top = parser()
    args = top.parse_args(arguments)
    if args.version:
        from ..version import __version__

        print(__version__)
        return 0
    if args.command is None:
        top.print_help()
        return 2
    try:
        return importlib.import_module(f"fastseg.commands.{COMMANDS[args.command][0]}").main(args)
    except Exception as error:
        if args.debug:
            raise
        expected = isinstance(error, (OSError, ValueError, RuntimeError, ImportError))
        said = str(error) if expected else f"{type(error).__name__}: {error} (a bug; --debug shows where)"
        if isinstance(error, OSError) and error.filename is not None:
            said = f"{error.filename}: {error.strerror}"
        print(f"fastseg {args.command}: error: {said}", file=sys.stderr)
        return 2 if expected else 1
    except KeyboardInterrupt:
        if args.debug:
            raise
        print(f"fastseg {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
