"""A learnt path past the transformer: what the forecasts after a step at scale 1 will be off by.

The residual path of DDiT (arXiv 2602.16968, section 3.2) runs from the latents to the output beside the blocks. Where
the model is not asked it is all that there is. It is taken once for all forecasts of a gap between two steps at scale
1, and costs about a hundredth of a call of a small model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddit.anchor import CLOSEST, Anchor
from ddit.patches import expand, half_log_snr, unpack

FARTHEST = 4.0
"""Growth of a forecast's error beyond which a correction grows no more."""
ORDERS = 2
"""Coefficients of a correction, a polynomial of how far ahead a forecast lies."""


class Forecaster(nn.Module):
    """An MLP on what the model's last layer read at an anchor, modulated by noise levels (FiLM, arXiv 1709.07871).

    Into each token the model has put what matters of its surroundings, as EAGLE (arXiv 2401.15077) found for words to
    come. To this come multiples of the clean latents that the model predicted, of how they changed per unit of lambda
    since the anchor before, and of how that change bent. Zero at first.

    Args:
        channels: Of the latents.
        patch: The model's own patch size in latent pixels.
        hidden: Width of the model.
        width: Features of a token here.
    """

    def __init__(self, channels: int, patch: int, hidden: int, width: int = 64) -> None:
        super().__init__()
        self.patch = patch
        self.first = nn.Linear(hidden, width)
        self.mix = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.last = nn.Linear(width, ORDERS * channels * patch**2)
        # A scale and a shift of each layer's features, then a gain for each output of each of three inputs.
        self._sizes = [width] * 6 + [channels * ORDERS * 3]
        self.levels = nn.Sequential(  # five numbers, and two sines of each
            nn.Linear(15, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, sum(self._sizes))
        )
        for parameter in (*self.last.parameters(), *self.levels[-1].parameters()):
            nn.init.zeros_(parameter)

    def forward(self, anchor: Anchor) -> Tensor:
        """Coefficients of what to add to the forecasts from an anchor, see `mend`.

        Args:
            anchor: Its latents ``[B, C, ..., H, W]`` have H and W that are multiples of the patch.

        Returns:
            ``[B, C, ORDERS, ..., H, W]``, float32.
        """
        clean, apart = anchor.clean, _apart(anchor).clamp_min(CLOSEST)
        assert anchor.step is not None and anchor.bend is not None, "the anchor was made for an adapter that mends"
        assert anchor.hidden is not None, "likewise"
        slope = (clean.value - clean.previous) * expand(2 / apart, clean.value)
        seen = torch.stack([clean.value, slope, anchor.bend], 2)
        step = anchor.step.clamp_min(CLOSEST)
        told = torch.stack([clean.level / 3, apart, step, torch.log(apart), torch.log(step)], 1)
        # Sines, so that factors may turn within a few noise levels (Fourier features, arXiv 2006.10739).
        told = torch.cat([told, torch.sin(told * (torch.pi / 2)), torch.sin(told * torch.pi)], 1)
        *factors, gains = self.levels(told.to(self.last.weight.dtype))[:, None].split(self._sizes, -1)
        tokens = F.silu(torch.addcmul(factors[1], self.first(anchor.hidden.to(gains.dtype)), 1 + factors[0]))
        for mix, scale, shift in zip(self.mix, factors[2::2], factors[3::2], strict=True):
            tokens = tokens + F.silu(torch.addcmul(shift, mix(tokens), 1 + scale))
        batch, channels, *grid = clean.value.shape
        made = unpack(self.last(tokens).float(), self.patch, (batch, channels * ORDERS, *grid))
        each = gains.float().reshape(batch * channels, ORDERS, 3)
        change = torch.baddbmm(made.reshape(*each.shape[:2], -1), each, seen.flatten(0, 1).flatten(2))
        return change.float().reshape(batch, channels, ORDERS, *grid)  # autocast multiplies in its own dtype

    @staticmethod
    def mend(velocity: Tensor, sigma: Tensor, anchor: Anchor, coefficients: Tensor) -> Tensor:
        """Add what is known of a forecast velocity's error to it, in place.

        With a single step at scale 1 behind it, that is zero.

        Args:
            velocity: ``[B, C, ..., H, W]``, float32.
            sigma: Noise level ``[B]`` of the step.
            anchor: What the forecast rests on.
            coefficients: What `forward` says of it.
        """
        apart, ahead = _apart(anchor), half_log_snr(sigma) - anchor.clean.level
        # As the error of a line through two points (`ddit.schedule.growth`), of clean latents, hence over sigma.
        growth = (ahead * (ahead + apart) / (apart + CLOSEST)).clamp(0, FARTHEST)
        size = torch.where(apart > 0, 0.1 * growth / (sigma + CLOSEST), 0)
        share = ahead / (ahead + apart + CLOSEST)
        for each in coefficients.unbind(2):
            velocity = velocity.addcmul_(each, expand(size, each))
            size = size * share
        return velocity


def _apart(anchor: Anchor) -> Tensor:
    return anchor.clean.level - anchor.clean.previous_level
