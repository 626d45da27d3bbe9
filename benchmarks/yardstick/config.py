"""Settings of the training."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

SIZES = (32, 64, 128)
"""Picture sizes in pixels the flow is trained at: 16, 64 and 256 image tokens."""
CLIP_SIZES = (16, 32, 64)
"""Clip sizes in pixels: 4, 16 and 64 tokens in each of 5 frames of latents."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both models are trained with; the defaults are for two CPU cores, `gpu` changes some for a GPU."""

    vae_steps: int = 4_000
    text_steps: int = 1_000
    low_steps: int = 3_000
    """Of the flow at half the size (stage A)."""
    high_steps: int = 6_000
    """Of the flow at full size (stage B)."""
    low_seconds: float | None = None
    high_seconds: float | None = None
    """These stages end after so long even if their steps are not done, the learning rate having fallen in time."""
    batch: int = 16
    """Samples in a batch at full size; as many times more at smaller ones as a sample is smaller."""
    low_mix: tuple[float, ...] = (0.1, 0.9, 0.0)
    """Share of the steps of stage A at a quarter of the size, half of it, and full size."""
    high_mix: tuple[float, ...] = (0.05, 0.2, 0.75)
    """The same for stage B, and for the distillation of guidance."""
    lr: float = 6e-3
    """Of Muon; AdamW has half of it."""
    low_noise: tuple[float, float] = (0.1, 1.1)
    """Noise levels of stage A at a quarter of the size are ``sigmoid(n)``, ``n`` normal of this mean and deviation; at
    others the mean is raised. Outlines are decided at high ones."""
    high_noise: tuple[float, float] = (-0.4, 1.3)
    """The same for stage B, and for the distillation of guidance."""
    mask_weight: float = 2.0
    """Weight of the loss on what covers what beside the flow's."""
    place_weight: float = 0.5
    """Weight of the loss on where objects are."""
    unconditional: float = 0.1
    """Chance that a prompt is replaced by the empty one."""
    ema: float = 0.998
    seed: int = 0
    compile: bool = False
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Processes that draw."""


@dataclass(frozen=True, kw_only=True)
class ImageSettings(Settings):
    """Of the image model."""

    pictures: int = 12_000
    distil_steps: int = 500
    """Of the distillation of guidance (stage C)."""
    distil_seconds: float | None = None
    guidance: tuple[float, float] = (1.0, 5.0)
    """Range of the guidance that is distilled."""


@dataclass(frozen=True, kw_only=True)
class VideoSettings(Settings):
    """Of the video model."""

    clips: int = 10_000
    text_steps: int = 600
    high_steps: int = 4_500


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """Of the judge of both."""

    pictures: int = 12_000
    clips: int = 2_000
    steps: int = 3_000
    judge_seconds: float | None = None
    """It ends after so long even if its steps are not done, the learning rate having fallen in time."""
    batch: int = 48
    """A quarter of it are frames of clips."""
    seed: int = 0
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)


GPU = {
    ImageSettings: {"pictures": 60_000, "batch": 128, "vae_steps": 12_000, "distil_steps": 2_000},
    VideoSettings: {"clips": 20_000, "batch": 48, "vae_steps": 8_000},
}
"""What is different on a GPU: larger batches, more to learn from, more steps."""


def gpu(kind: type[Settings]) -> dict[str, object]:
    """Changes of the defaults for a GPU."""
    return {"low_steps": 15_000, "high_steps": 20_000, "ema": 0.999, "compile": True, **GPU[kind]}
