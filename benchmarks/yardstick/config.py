"""Settings of the training."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import get_type_hints

from ddit.util.kinds import fits, told


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both models are trained with; the defaults are for two CPU cores, `gpu` changes some for a GPU."""

    vae_steps: int = 4_000
    text_steps: int = 1_000
    sizes: tuple[tuple[int, ...], ...]
    """Of each stage of the flow: heights and widths in pixels it learns, rising; the last is its own."""
    steps: tuple[int, ...]
    """Of each stage."""
    seconds: tuple[float | None, ...]
    """Each stage ends after so long even if its steps are not done, the learning rate having fallen in time."""
    mix: tuple[tuple[float, ...], ...]
    """Share of each stage's steps at each of its sizes; the last also for the distillation of guidance."""
    noise: tuple[tuple[float, float], ...]
    """Noise levels of each stage are ``sigmoid(n)``, ``n`` normal of this mean and deviation at its smallest size; at
    others the mean is raised. Outlines are decided at high ones. The last also for the distillation of guidance."""
    batch: tuple[int, ...]
    """Samples in a batch at each stage's own size; as many times more at others as a sample is smaller."""
    lr: float = 6e-3
    """Of Muon; AdamW has half of it."""
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

    def __post_init__(self) -> None:
        """Raises a `ValueError` where a value is of another kind, or a stage lacks something."""
        for name, hint in get_type_hints(type(self)).items():
            if not fits(getattr(self, name), hint):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {told(hint)}")
        for name in ("steps", "seconds", "batch", "mix", "noise"):
            if len(getattr(self, name)) != len(self.sizes):
                raise ValueError(f"{name} is a list with a value for each of the {len(self.sizes)} stages of sizes")
        for sizes, mix in zip(self.sizes, self.mix, strict=True):
            if len(mix) != len(sizes):
                raise ValueError(f"mix needs a share for each of the sizes {', '.join(map(str, sizes))} of a stage")

    @property
    def all_sizes(self) -> list[int]:
        """Of all stages, rising."""
        return sorted({size for stage in self.sizes for size in stage})


@dataclass(frozen=True, kw_only=True)
class ImageSettings(Settings):
    """Of the image model: 16, 64 and 256 image tokens."""

    sizes: tuple[tuple[int, ...], ...] = ((32, 64), (32, 64, 128))
    steps: tuple[int, ...] = (3_000, 6_000)
    seconds: tuple[float | None, ...] = (None, None)
    batch: tuple[int, ...] = (64, 16)
    mix: tuple[tuple[float, ...], ...] = ((0.1, 0.9), (0.05, 0.2, 0.75))
    noise: tuple[tuple[float, float], ...] = ((0.1, 1.1), (-0.4, 1.3))
    pictures: int = 12_000
    distil_steps: int = 500
    """Of the distillation of guidance."""
    distil_seconds: float | None = None
    guidance: tuple[float, float] = (1.0, 5.0)
    """Range of the guidance that is distilled."""


@dataclass(frozen=True, kw_only=True)
class VideoSettings(Settings):
    """Of the video model: up to 9, 36 and 144 tokens in each of 5 frames of latents."""

    sizes: tuple[tuple[int, ...], ...] = ((16, 32), (16, 32, 64), (24, 48, 96))
    steps: tuple[int, ...] = (3_000, 4_500, 4_000)
    seconds: tuple[float | None, ...] = (None, None, None)
    batch: tuple[int, ...] = (64, 16, 12)
    mix: tuple[tuple[float, ...], ...] = ((0.1, 0.9), (0.05, 0.2, 0.75), (0.1, 0.2, 0.7))
    noise: tuple[tuple[float, float], ...] = ((0.1, 1.1), (-0.4, 1.3), (0.0, 1.3))
    clips: int = 10_000
    text_steps: int = 600


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
    ImageSettings: {
        "pictures": 60_000,
        "batch": (512, 128),
        "vae_steps": 12_000,
        "steps": (15_000, 20_000),
        "distil_steps": 2_000,
    },
    VideoSettings: {"clips": 20_000, "vae_steps": 8_000, "steps": (15_000, 15_000, 15_000), "batch": (192, 48, 32)},
}
"""What is different on a GPU: larger batches, more to learn from, more steps."""


def gpu(kind: type[Settings]) -> dict[str, object]:
    """Changes of the defaults for a GPU."""
    return {"ema": 0.999, "compile": True, **GPU[kind]}
