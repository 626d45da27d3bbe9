"""Dynamic patch scheduling for diffusion transformers (arXiv 2602.16968).

Public names are resolved on first use, so `import ddit` and `ddit --help` stay quick and never import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddit.adapter import PatchAdapter
    from ddit.api import apply
    from ddit.config import FixedSchedule, PatchSchedule, PlannedSchedule, SkipSchedule
    from ddit.report import Report

__version__ = "0.2.0"

__all__ = [
    "FixedSchedule",
    "PatchAdapter",
    "PatchSchedule",
    "PlannedSchedule",
    "Report",
    "SkipSchedule",
    "__version__",
    "apply",
]

_HOME = {
    "apply": "ddit.api",
    "FixedSchedule": "ddit.config",
    "PatchAdapter": "ddit.adapter",
    "PatchSchedule": "ddit.config",
    "PlannedSchedule": "ddit.config",
    "Report": "ddit.report",
    "SkipSchedule": "ddit.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access no longer comes here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
