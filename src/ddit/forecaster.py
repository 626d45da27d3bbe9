"""A learnt path past the transformer: what a forecast is off by, seen from what it rests on.

The residual path of DDiT (arXiv 2602.16968, section 3.2) runs from the latents to the output beside the blocks. Where
the model is not asked it is all that there is; it costs about a hundredth of a call of a small model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddit.models.base import Anchor
from ddit.patches import expand, half_log_snr

CLOSEST = 0.05
"""Least distance in lambda between two steps at scale 1 that is divided by."""
FARTHEST = 4.0
"""Growth of a forecast's error beyond which a correction grows no more."""


class Forecaster(nn.Module):
    """Convolutions on the tokens of the model's own patches, modulated by noise levels (FiLM, arXiv 1709.07871).

    It sees the forecast clean latents, and how they changed per unit of lambda. Zero at first.

    Args:
        channels: Of the latents.
        patch: The model's own patch size in latent pixels.
        width: Features of a token.
    """

    def __init__(self, channels: int, patch: int, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Conv2d(2 * channels, width, patch, stride=patch)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.ConvTranspose2d(width, channels, patch, stride=patch)
        self.levels = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 4 * width + 2 * channels))
        for parameter in (*self.last.parameters(), *self.levels[2].parameters()):
            nn.init.zeros_(parameter)
        self._sizes = [width] * 4 + [channels] * 2

    def forward(self, sigma: Tensor, anchor: Anchor) -> Tensor:
        """What to add to the forecast velocity.

        Args:
            sigma: Noise level ``[B]`` of the step.
            anchor: What the forecast rests on, latents ``[B, C, ..., H, W]`` whose H and W are multiples of the patch.
                With a single step at scale 1 behind it the answer is zero.

        Returns:
            ``[B, C, ..., H, W]``, float32.
        """
        clean, level = anchor.clean, half_log_snr(sigma)
        ahead, apart = level - clean.level, clean.level - clean.previous_level
        slope = 2 * (clean.value - clean.previous) / expand(apart.clamp_min(CLOSEST), clean.value)
        told = torch.stack([level / 3, ahead, apart, torch.exp(-level / 4) - 1, sigma], 1).to(self.first.weight.dtype)
        forecast, slope = (_pictures(z).to(told.dtype) for z in (clean.at(level), slope))
        frames = len(slope) // len(sigma)
        factors = self.levels(told).repeat_interleave(frames, 0)[..., None, None].split(self._sizes, 1)
        first_scale, first_shift, mix_scale, mix_shift, of_forecast, of_slope = factors
        tokens = F.silu(self.first(torch.cat([forecast, slope], 1)) * (1 + first_scale) + first_shift)
        tokens = tokens + F.silu(self.mix(tokens) * (1 + mix_scale) + mix_shift)
        change = self.last(tokens) + of_forecast * forecast + of_slope * slope
        # As the error of a line through two points (`ddit.schedule.growth`), of clean latents, hence over sigma.
        growth = (ahead * (ahead + apart) / (apart + CLOSEST)).clamp(0, FARTHEST)
        size = torch.where(apart > 0, 0.1 * growth / (sigma + CLOSEST), 0)
        grouped = change.float().unflatten(0, (len(sigma), frames)).transpose(1, 2).reshape(clean.value.shape)
        return grouped * expand(size, grouped)


def _pictures(z: Tensor) -> Tensor:
    """``[B, C, (F,) H, W] -> [B F, C, H, W]``."""
    return z if z.ndim == 4 else z.transpose(1, 2).flatten(0, 1)
