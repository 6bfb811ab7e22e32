"""`python -m fastseg` runs the command `fastseg`."""

import sys

from .commands.cli import main

sys.exit(main())
