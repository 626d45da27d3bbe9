"""What `ddit.apply` has settled, and `ddit.handle.Handle` carries out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ddit.adapter import PatchAdapter
from ddit.caches import Config
from ddit.config import Coarse, PatchSchedule
from ddit.models.base import Architecture
from ddit.run import Skipping
from ddit.schedule import Policy


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that `ddit.apply` has settled, before anything is changed."""

    architectures: Sequence[Architecture]
    called: Sequence[Any]
    """What the pipeline calls: their transformers, or ``torch.compile``'s wrappers around these."""
    pipe: Any
    policy: Policy
    measure: PatchSchedule
    """How statistics are measured, for a policy that needs them."""
    coarse: Coarse
    variance: dict[int, Tensor]
    """Scale -> variance of the detail per channel."""
    adapter: PatchAdapter | None = None
    make_skipper: Callable[[float], Skipping] | None = None
    """Makes that of a new run, from a corrector's work for a gap in calls of the model."""
    corrector: Any = None
    """A `ddit.ForecastCorrector`."""
    speedup: float | None = None
    """What skipping was asked for."""
    cache: Config | None = None
    costs: Mapping[int, float] = field(default_factory=dict)
    """Scale -> work of a step in full steps, in place of the model's own."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What was asked for in words, for `Handle.__repr__`."""
