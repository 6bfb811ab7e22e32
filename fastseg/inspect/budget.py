"""How many instructions a memory-bound call may need, and which calls need more, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PER_BYTE = {90: 3.5, 100: 2.5}  # thread instructions a byte of the floor: half of the issue slots of an H200 and a B200
IN_FLIGHT = 0.6  # of the bytes that Little's law asks for


def reason(row: Mapping[str, Any]) -> str | None:
    """Why a call is above the budget; None if it is not."""
    return None
