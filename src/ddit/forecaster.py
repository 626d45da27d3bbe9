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
from ddit.patches import expand, half_log_snr, pack, unpack

FARTHEST = 4.0
"""Growth of a forecast's error beyond which a correction grows no more."""
ORDERS = 2
"""Coefficients of a correction, a polynomial of how far ahead a forecast lies."""


class Forecaster(nn.Module):
    """An MLP on each of the model's own tokens, modulated by noise levels (FiLM, arXiv 1709.07871).

    It sees the clean latents that the model predicted at an anchor, how they changed per unit of lambda since the one
    before, and how that change bent; and what the model's last layer read there. Of what lies around a token the model
    has put into that what matters, as EAGLE (arXiv 2401.15077) found for words to come: convolutions add nothing to it.
    Zero at first.

    Args:
        channels: Of the latents.
        patch: The model's own patch size in latent pixels.
        hidden: Width of the model.
        width: Features of a token here.
    """

    def __init__(self, channels: int, patch: int, hidden: int, width: int = 64) -> None:
        super().__init__()
        self.patch = patch
        token, outputs = channels * patch**2, ORDERS * channels
        self.latents = nn.ModuleList([nn.Linear(token, width, bias=False) for _ in range(3)])
        self.hidden = nn.Linear(hidden, width)
        self.mix = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.last = nn.Linear(width, ORDERS * token)
        # A scale and a shift of each hidden layer's features, then a gain of each input for each output.
        self._sizes = [width] * 6 + [outputs] * 3
        self.levels = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, sum(self._sizes)))
        for parameter in (*self.last.parameters(), *self.levels[2].parameters()):
            nn.init.zeros_(parameter)

    def forward(self, anchor: Anchor) -> Tensor:
        """Coefficients of what to add to the forecasts from an anchor, see `at`.

        Args:
            anchor: Its latents ``[B, C, ..., H, W]`` have H and W that are multiples of the patch.

        Returns:
            ``[B, ORDERS, C, ..., H, W]``, float32.
        """
        clean, level, apart = anchor.clean, anchor.clean.level, _apart(anchor)
        assert anchor.step is not None and anchor.bend is not None, "the anchor was made for an adapter that mends"
        assert anchor.hidden is not None, "likewise"
        slope = 2 * (clean.value - clean.previous) / expand(apart.clamp_min(CLOSEST), clean.value)
        told = torch.stack([level / 3, apart, anchor.step, torch.exp(-level / 4) - 1, anchor.sigma], 1)
        told = told.to(self.last.weight.dtype)
        factors = self.levels(told)[:, None].split(self._sizes, -1)
        seen = [pack(z, self.patch).to(told.dtype) for z in (clean.value, slope, anchor.bend)]
        tokens = self.hidden(anchor.hidden.to(told.dtype))
        for layer, z in zip(self.latents, seen, strict=True):
            tokens += layer(z)
        tokens = F.silu(torch.addcmul(factors[1], tokens, 1 + factors[0]))
        for mix, scale, shift in zip(self.mix, factors[2:6:2], factors[3:6:2], strict=True):
            tokens = tokens + F.silu(torch.addcmul(shift, mix(tokens), 1 + scale))
        batch, channels, *grid = clean.value.shape
        change = self.last(tokens).unflatten(-1, (ORDERS, -1))
        for gain, z in zip(factors[6:], seen, strict=True):
            each = gain.repeat_interleave(self.patch**2, -1).unflatten(-1, (ORDERS, -1))
            change.addcmul_(each, z[:, :, None])
        made = unpack(change.flatten(2).float(), self.patch, (batch, ORDERS * channels, *grid))
        return made.contiguous().unflatten(1, (ORDERS, channels))

    @staticmethod
    def at(sigma: Tensor, anchor: Anchor, coefficients: Tensor) -> Tensor:
        """What to add to the forecast velocity ``[B, C, ..., H, W]``.

        With a single step at scale 1 behind it, that is zero.

        Args:
            sigma: Noise level ``[B]`` of the step.
            anchor: What the forecast rests on.
            coefficients: What `forward` says of it.
        """
        apart, ahead = _apart(anchor), half_log_snr(sigma) - anchor.clean.level
        # As the error of a line through two points (`ddit.schedule.growth`), of clean latents, hence over sigma.
        growth = (ahead * (ahead + apart) / (apart + CLOSEST)).clamp(0, FARTHEST)
        size = torch.where(apart > 0, 0.1 * growth / (sigma + CLOSEST), 0)
        share = ahead / (ahead + apart + CLOSEST)
        powers = torch.stack([size * share**k for k in range(ORDERS)], 1)
        return torch.bmm(powers[:, None], coefficients.flatten(2)).reshape(anchor.clean.value.shape)


def _apart(anchor: Anchor) -> Tensor:
    return anchor.clean.level - anchor.clean.previous_level
