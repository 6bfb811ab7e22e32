"""Options that several commands have."""

from __future__ import annotations

import argparse


def parse_size(text: str) -> tuple[int, int]:
    """Convert "360x480" to (360, 480), height first. An argparse type.

    >>> from fastseg.commands.options import parse_size
    >>> parse_size("360x480")
    (360, 480)
    """
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH, for example 360x480, but is {text!r}")
    return int(height), int(width)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if available)")
