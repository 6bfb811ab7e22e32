"""Options that several commands take."""

from __future__ import annotations

import argparse


def parse_size(text: str) -> tuple[int, int]:
    """ "360x480" as (360, 480), height first; an argparse type."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH, for example 360x480, not {text!r}")
    return int(height), int(width)
