"""`python -m fastseg` is the command `fastseg`."""

import sys

from .commands.cli import main

sys.exit(main())
