"""Dynamic patch scheduling for diffusion transformers (arXiv 2602.16968).

Public names are resolved on first use, so `import ddit` and `ddit --help` stay quick and never import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddit.adapter import PatchAdapter
    from ddit.api import Handle, apply
    from ddit.caches import CacheDitConfig
    from ddit.config import ScheduleConfig
    from ddit.models import supported_models
    from ddit.report import Report
    from ddit.teacache import TeaCacheConfig

__version__ = "0.1.0"

__all__ = [
    "CacheDitConfig",
    "Handle",
    "PatchAdapter",
    "Report",
    "ScheduleConfig",
    "TeaCacheConfig",
    "__version__",
    "apply",
    "supported_models",
]

_HOME = {
    "apply": "ddit.api",
    "Handle": "ddit.api",
    "PatchAdapter": "ddit.adapter",
    "CacheDitConfig": "ddit.caches",
    "ScheduleConfig": "ddit.config",
    "Report": "ddit.report",
    "TeaCacheConfig": "ddit.teacache",
    "supported_models": "ddit.models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access no longer comes here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
