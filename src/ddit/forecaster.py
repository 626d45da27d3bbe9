"""A learnt path past the transformer: what a forecast is off by, seen from what it rests on.

The residual path of DDiT (arXiv 2602.16968, section 3.2) runs from the latents to the output beside the blocks. Where
the model is not asked it is all that there is; it costs about a hundredth of a call of a small model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddit.models.base import Anchor
from ddit.patches import expand, half_log_snr

CLOSEST = 0.05
"""Least distance in lambda between two steps at scale 1 that is divided by."""
FARTHEST = 4.0
"""Growth of a forecast's error beyond which a correction grows no more."""


class Forecaster(nn.Module):
    """Convolutions on the tokens of the model's own patches, modulated by noise levels (FiLM, arXiv 1709.07871).

    It sees the noisy latents, the forecast clean latents, and how these changed per unit of lambda. Zero at first.

    Args:
        channels: Of the latents.
        patch: The model's own patch size in latent pixels.
        width: Features of a token.
    """

    def __init__(self, channels: int, patch: int, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Conv2d(3 * channels, width, patch, stride=patch)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.ConvTranspose2d(width, channels, patch, stride=patch)
        self.levels = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 4 * width + 3 * channels))
        for parameter in (*self.last.parameters(), *self.levels[2].parameters()):
            nn.init.zeros_(parameter)
        self._sizes = [width] * 4 + [channels] * 3

    def forward(self, latents: Tensor, sigma: Tensor, anchor: Anchor) -> Tensor:
        """What to add to the forecast velocity.

        Args:
            latents: Noisy ``[B, C, ..., H, W]``, float32; H and W are multiples of the patch.
            sigma: Their noise level ``[B]``.
            anchor: What the forecast rests on. With a single step at scale 1 behind it the answer is zero.

        Returns:
            ``[B, C, ..., H, W]``, float32.
        """
        level, newest, before = half_log_snr(sigma), anchor.clean.level, anchor.clean.previous_level
        apart = (newest - before).clamp_min(CLOSEST)
        slope = 2 * (anchor.clean.value - anchor.clean.previous) / expand(apart, latents)
        seen = [anchor.clean.at(level), slope, latents]
        told = torch.stack([level / 3, level - newest, newest - before, torch.exp(-level / 4) - 1, sigma], 1)
        frames = latents.shape[2] if latents.ndim == 5 else 1
        *modulation, a, b, c = (
            x.repeat_interleave(frames, 0)[..., None, None]
            for x in self.levels(told.to(self.first.weight.dtype)).split(self._sizes, 1)
        )
        pictures = [_frames(x).to(a.dtype) for x in seen]
        scale, shift, scale2, shift2 = modulation
        tokens = nn.functional.silu(self.first(torch.cat(pictures, 1)) * (1 + scale) + shift)
        tokens = tokens + nn.functional.silu(self.mix(tokens) * (1 + scale2) + shift2)
        change = self.last(tokens) + a * pictures[0] + b * pictures[1] + c * pictures[2]
        # As the error of a line through two points (`ddit.schedule.growth`), of clean latents, hence over sigma.
        growth = ((level - newest) * (level - before) / (newest - before + CLOSEST)).clamp(0, FARTHEST)
        size = torch.where(newest > before, 0.1 * growth / (sigma + CLOSEST), 0)
        shaped = change.float().reshape(len(latents), frames, *change.shape[1:]).transpose(1, 2).reshape(latents.shape)
        return shaped * expand(size, shaped)


def _frames(z: Tensor) -> Tensor:
    """``[B, C, (F,) H, W] -> [B F, C, H, W]``."""
    return z if z.ndim == 4 else z.transpose(1, 2).flatten(0, 1)
