"""`python -m fastseg` is the command `fastseg`."""

import sys

from .cli import main

sys.exit(main())
