"""Warnings that name the user's own line, however deep below it they come up."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

OURS = str(Path(__file__).parents[1])
BETWEEN = ("torch", "diffusers", "accelerate", "functools", "contextlib")
"""Packages and modules that lie between a user's call and ours."""


def warn(message: str) -> None:
    """Warn of what the user did, at the user's line: the nearest that is neither ours nor of `BETWEEN`."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "")
        if not frame.f_code.co_filename.startswith(OURS) and name.split(".")[0] not in BETWEEN:
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)
