"""A small net beside the transformer that has learnt what forecasts will be off by.

It is asked once for all forecasts of a gap between two called steps, and costs about a hundredth of a call of a small
model.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from ddit.models import architecture_for
from ddit.models.base import Architecture
from ddit.patches import expand, unpack
from ddit.pretrained import TrainedPart, config_hash
from ddit.skip.forecast import CLOSEST, Reference, half_log_snr

FARTHEST = 4.0
"""Growth of a forecast's error beyond which a correction grows no more."""
ORDERS = 2
"""Coefficients of a correction, a polynomial of how far ahead a forecast lies."""


class CorrectionNet(nn.Module):
    """An MLP on what the model's last layer read at a reference, modulated by noise levels (FiLM, arXiv 1709.07871).

    Into each token the model has put what matters of its surroundings, as EAGLE (arXiv 2401.15077) found for words to
    come. To this come multiples of the clean latents that the model predicted, of how they changed per unit of lambda
    since the reference before, and of how that change bent. Zero at first.

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

    def forward(self, reference: Reference) -> Tensor:
        """Coefficients of what to add to the forecasts from a reference, see `ForecastCorrector.correct`.

        Args:
            reference: Its latents ``[B, C, ..., H, W]`` have H and W that are multiples of the patch.

        Returns:
            ``[B, C, ORDERS, ..., H, W]``, float32.
        """
        clean, apart = reference.clean, _apart(reference).clamp_min(CLOSEST)
        assert reference.step is not None and reference.bend is not None, "the reference was made for a corrector"
        assert reference.hidden is not None, "likewise"
        slope = (clean.value - clean.previous) * expand(2 / apart, clean.value)
        seen = torch.stack([clean.value, slope, reference.bend], 2)
        step = reference.step.clamp_min(CLOSEST)
        told = torch.stack([clean.level / 3, apart, step, torch.log(apart), torch.log(step)], 1)
        # Sines, so that factors may turn within a few noise levels (Fourier features, arXiv 2006.10739).
        told = torch.cat([told, torch.sin(told * (torch.pi / 2)), torch.sin(told * torch.pi)], 1)
        *factors, gains = self.levels(told.to(self.last.weight.dtype))[:, None].split(self._sizes, -1)
        tokens = F.silu(torch.addcmul(factors[1], self.first(reference.hidden.to(gains.dtype)), 1 + factors[0]))
        for mix, scale, shift in zip(self.mix, factors[2::2], factors[3::2], strict=True):
            tokens = tokens + F.silu(torch.addcmul(shift, mix(tokens), 1 + scale))
        batch, channels, *grid = clean.value.shape
        made = unpack(self.last(tokens).float(), self.patch, (batch, channels * ORDERS, *grid))
        each = gains.float().reshape(batch * channels, ORDERS, 3)
        change = torch.baddbmm(made.reshape(*each.shape[:2], -1), each, seen.flatten(0, 1).flatten(2))
        return change.float().reshape(batch, channels, ORDERS, *grid)  # autocast multiplies in its own dtype


class ForecastCorrector(TrainedPart):
    """Corrects forecasts in skipped steps; made by `for_model`, trained by ``ddit train --corrector``.

    Args:
        base: Class of the transformer.
        base_hash: `ddit.pretrained.config_hash` of the transformer.
        channels: Of the latents.
        patch: The model's own patch size in latent pixels.
        width: Width of the transformer.
        sampler: Class of the scheduler under which it learnt.
        steps_trained: Number of optimiser steps so far.
        ddit_version: Version of ddit that made it.
    """

    noun = "corrector"
    beside = "patches=ddit.FixedSchedule(steps=(1,)), skip=ddit.SkipSchedule(speedup=3), "

    @register_to_config
    def __init__(
        self,
        base: str,
        base_hash: str,
        channels: int,
        patch: int,
        width: int,
        sampler: str | None = None,
        steps_trained: int = 0,
        ddit_version: str = "",
    ) -> None:
        super().__init__()
        self.path = CorrectionNet(channels, patch, width)
        self._hidden: Tensor | None = None
        self._own = Architecture.own

    @classmethod
    def for_model(cls, transformer: nn.Module, *, sampler: str | None = None) -> ForecastCorrector:
        """A new corrector for a transformer, which corrects nothing yet.

        Args:
            sampler: Class of the scheduler under which it will learn.

        Raises:
            ValueError: For an unsupported model, or one of audio.
        """
        from ddit import __version__

        architecture = architecture_for(transformer)
        if architecture.axes == 1:
            raise ValueError(
                f"a corrector knows pictures and clips, and {type(transformer).__name__} makes audio; "
                "forecasts of skipped steps need none, so leave it out"
            )
        return cls(
            base=type(architecture.transformer).__name__,
            base_hash=config_hash(architecture.transformer),
            channels=architecture.channels,
            patch=architecture.patch_size,
            width=architecture.width,
            sampler=sampler,
            ddit_version=__version__,
        )

    def attach(self, transformer: nn.Module) -> RemovableHandle:
        """Listen to what the transformer's last layer reads, until the handle's ``remove``.

        Raises:
            ValueError: See `check`.
        """
        self.check(transformer)
        architecture = architecture_for(transformer)
        self._own = architecture.own

        def listen(layer: nn.Module, args: tuple[Any, ...]) -> None:
            self._hidden = args[0]

        return architecture.layer(architecture.head).register_forward_pre_hook(listen)

    def take_hidden(self) -> Tensor:
        """What the last layer read ``[B, N, width]`` in the call before; it is given once."""
        hidden, self._hidden = self._hidden, None
        assert hidden is not None, "the corrector is on the model, which was called"
        return hidden.detach() if not torch.is_grad_enabled() else hidden

    def encode(self, reference: Reference) -> Tensor:
        """What is known at a reference of its forecasts' errors, see `CorrectionNet.forward`."""
        self._join(reference.sigma.device)
        assert reference.hidden is not None, "the reference was made for a corrector"
        tokens = prod(reference.clean.value.shape[2:]) // self.config["patch"] ** 2
        return self.path(replace(reference, hidden=self._own(reference.hidden, tokens)))

    def correct(self, velocity: Tensor, sigma: Tensor, reference: Reference) -> Tensor:
        """Add what is known of a forecast velocity's error to it, in place.

        With a single called step behind it, that is zero.

        Args:
            velocity: ``[B, C, ..., H, W]``, float32.
            sigma: Noise level ``[B]`` of the step.
            reference: What the forecast rests on, with its ``correction``, or without, and then it is made.
        """
        if reference.correction is None:
            reference.correction = self.encode(reference)
        apart, ahead = _apart(reference), half_log_snr(sigma) - reference.clean.level
        # As the error of a line through two points (`ddit.skip.forecast.growth`), of clean latents, hence over sigma.
        growth = (ahead * (ahead + apart) / (apart + CLOSEST)).clamp(0, FARTHEST)
        size = torch.where(apart > 0, 0.1 * growth / (sigma + CLOSEST), 0)
        share = ahead / (ahead + apart + CLOSEST)
        for each in reference.correction.unbind(2):
            velocity = velocity.addcmul_(each, expand(size, each))
            size = size * share
        return velocity

    def count_flops(self, latents: Tensor) -> int:
        """Floating-point operations of `encode` for one sample of latents ``[B, C, ..., H, W]``."""
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            z, sigma = torch.empty(1, *latents.shape[1:]), torch.empty(1)
            hidden = torch.empty(1, prod(z.shape[2:]) // self.config["patch"] ** 2, self.config["width"])
            twin: Any = type(self).from_config(self.config)
            twin.encode(Reference.after(z, sigma, z, end=sigma, hidden=hidden))
        return counter.get_total_flops()


def _apart(reference: Reference) -> Tensor:
    return reference.clean.level - reference.clean.previous_level
