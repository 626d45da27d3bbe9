"""What is kept of a run when its latents are gone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ddit.report import Step


@dataclass
class Log:
    """The steps that a run has taken, and all that they are priced by."""

    total: int | None = None
    """Number of steps, where known."""
    examples: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Scale -> arguments of one sample's call without data: costs are counted from these when asked for."""
    steps: list[Step] = field(default_factory=list)
    """The one under way last."""
    forced: str | None = None
    """Why some steps had to be full, or ``None``."""
    reused_share: float = 0.0
    """What a call costs in which a cache answers, as a fraction of the whole call."""

    @property
    def whole(self) -> bool:
        """Whether no step is missing, as far as anybody knows."""
        return self.total in (None, len(self.steps))

    def amend(self, **changes: Any) -> None:
        """Tell other values of the step under way."""
        self.steps[-1] = replace(self.steps[-1], **changes)
