"""Where the commands print their tables."""

from rich.console import Console

PIPED_WIDTH = 200


def console(stderr: bool = False) -> Console:
    """A console as wide as the terminal; wide enough for every table where the output is piped or written to a file."""
    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal:
        made.width = PIPED_WIDTH
    return made
