"""Peak memory of a piece of work: of the GPU where there is one, elsewhere of this process (Linux only)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Outcome = TypeVar("Outcome")
_PROCESS = Path("/proc/self")


def with_peak(work: Callable[[], Outcome], device: torch.device) -> tuple[Outcome, int | None]:
    """The work's outcome, and the bytes at its peak beyond what lay there before.

    ``None`` where nobody tells: on other devices than CUDA's and the CPU, and on systems without Linux's ``/proc``.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return work(), torch.cuda.max_memory_allocated(device) - before
    try:
        if device.type != "cpu":
            raise OSError
        (_PROCESS / "clear_refs").write_text("5")  # the peak starts anew from here
        before = _resident("VmRSS")
    except OSError:
        return work(), None
    return work(), max(_resident("VmHWM") - before, 0)


def _resident(name: str) -> int:
    """A line of ``/proc/self/status`` in bytes."""
    lines = (line.split() for line in (_PROCESS / "status").read_text().splitlines())
    return 1024 * next(int(words[1]) for words in lines if words[0] == f"{name}:")
