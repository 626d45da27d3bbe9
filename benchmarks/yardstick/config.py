"""Settings of the training."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

SIZES = (32, 64, 128)
"""Picture sizes in pixels the flow is trained at: 16, 64 and 256 image tokens."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All stages; the defaults are for two CPU cores, `gpu` has those for a GPU."""

    pictures: int = 16_000
    vae_steps: int = 4_000
    text_steps: int = 1_000
    low_steps: int = 6_000
    """Of the flow at 64 pixels (stage A)."""
    high_steps: int = 8_000
    """Of the flow at 128 pixels (stage B)."""
    distil_steps: int = 800
    """Of the distillation of guidance (stage C)."""
    low_seconds: float | None = None
    high_seconds: float | None = None
    distil_seconds: float | None = None
    """These stages end after so long even if their steps are not done, the learning rate having fallen in time."""
    judge_steps: int = 3_000
    batch: int = 16
    """Pictures in a batch at 128 pixels; twice as many at 64, four times as many at 32."""
    low_mix: tuple[float, ...] = (0.1, 0.9, 0.0)
    """Share of the steps of stage A at each of `SIZES`."""
    high_mix: tuple[float, ...] = (0.05, 0.2, 0.75)
    """The same for stages B and C."""
    lr: float = 2.4e-3
    """Of Muon; AdamW has half of it."""
    noise_mean: float = 0.4
    """Noise levels at 32 pixels are ``sigmoid(n)`` with ``n`` normal of this mean; at larger sizes it is raised."""
    noise_std: float = 1.3
    mask_weight: float = 2.0
    """Weight of the loss on what covers what beside the flow's."""
    unconditional: float = 0.1
    """Chance that a prompt is replaced by the empty one."""
    guidance: tuple[float, float] = (1.0, 5.0)
    """Range of the guidance that is distilled."""
    ema: float = 0.998
    seed: int = 0
    compile: bool = False
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Processes that draw."""


def gpu(**changes) -> Settings:
    """Settings for a GPU: larger batches, more pictures, more steps."""
    large = {"pictures": 60_000, "batch": 128, "low_steps": 15_000, "high_steps": 20_000, "distil_steps": 2_000}
    return Settings(**{**large, "vae_steps": 12_000, "ema": 0.999, "compile": True, **changes})
