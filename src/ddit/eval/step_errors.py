"""What coarse steps and forecasts are off by along a model's plain runs: the profile that plans are made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddit.coarse import coarse_step
from ddit.config import Coarse
from ddit.models.base import Architecture, Inputs, Noisy
from ddit.profile import ErrorProfile
from ddit.skip.forecast import Reference, half_log_snr

LEVELS = (0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Noise levels that are measured: of a run the steps that are nearest."""
APART = 2
"""Steps between the called ones that forecasts are measured with, and from the last of these to the forecast."""


@dataclass(frozen=True)
class Errors:
    """Mean squares over samples and numbers of the latents, of each measured step; goes into JSON."""

    sigmas: list[float]
    """Falling."""
    coarse: dict[int, list[float]]
    """Scale -> what a coarse step is off by."""
    bend: list[float]
    """What a forecast is off by, divided by the fourth power of its distance in lambda."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Errors:
        """The inverse of `dataclasses.asdict`, through JSON."""
        return cls(**{**values, "coarse": {int(s): v for s, v in values["coarse"].items()}})


def first_passes(
    architecture: Architecture, calls: Sequence[tuple[Inputs, Tensor]]
) -> list[tuple[Inputs, Noisy, Tensor]]:
    """Of each step of a run its first guidance pass: the arguments, what they are about, and the velocity in float32.

    Args:
        calls: The transformer's, in order (`ddit.pipelines.generate.recorded`).
    """
    steps: dict[float, tuple[Inputs, Tensor]] = {}
    for inputs, answer in calls:
        steps.setdefault(float(architecture.sigma(inputs)[0]), (inputs, answer))
    found = []
    for sigma in sorted(steps, reverse=True):
        inputs, answer = steps[sigma]
        noisy = architecture.read(inputs)
        found.append((inputs, noisy, architecture.velocity(answer, noisy.latents.shape[2:]).float()))
    return found


@torch.no_grad()
def measured_errors(
    architecture: Architecture, calls: Sequence[tuple[Inputs, Tensor]], scales: Sequence[int]
) -> Errors:
    """Of the first guidance pass of a plain run.

    Args:
        calls: The transformer's, in order (`ddit.pipelines.generate.recorded`).
        scales: Above 1.
    """
    steps = first_passes(architecture, calls)
    read, answers = [noisy for _, noisy, _ in steps], [answer for _, _, answer in steps]
    sigmas = [float(noisy.sigma[0]) for noisy in read]
    nearest = (min(range(len(sigmas)), key=lambda i, level=level: abs(sigmas[i] - level)) for level in LEVELS)
    chosen = sorted({i for i in nearest if i >= 2 * APART})
    coarse: dict[int, list[float]] = {scale: [] for scale in scales}
    bend = []
    for i in chosen:
        inputs = steps[i][0]
        for scale in scales:
            forward = architecture.transformer.forward
            velocity = coarse_step(architecture, forward, inputs, read[i], scale, Coarse())
            coarse[scale].append(float((velocity - answers[i]).square().mean()))
        reference = None
        for k in (i - 2 * APART, i - APART):
            sigma = read[k].sigma.float()
            reference = Reference.after(read[k].latents.float(), sigma, answers[k], reference)
        assert reference is not None, "two steps"
        off = reference.forecast(read[i].latents, read[i].sigma.float()) - answers[i]
        distance = half_log_snr(sigmas[i]) - half_log_snr(sigmas[i - APART])
        bend.append(float(off.square().mean()) / distance**4)
    return Errors([sigmas[i] for i in chosen], coarse, bend)


def profile_of(done: Sequence[tuple[int, Errors]]) -> ErrorProfile | None:
    """The profile of several batches, each with its number of samples; ``None`` of runs too short to measure."""
    counts = [count for count, _ in done]
    first = done[0][1]
    if not first.sigmas:
        return None

    def root(lists: list[list[float]]) -> tuple[float, ...]:
        return tuple(np.sqrt(np.average(lists, axis=0, weights=counts))[::-1].tolist())

    coarse = {s: root([errors.coarse[s] for _, errors in done]) for s in first.coarse}
    return ErrorProfile(sigmas=tuple(first.sigmas[::-1]), coarse=coarse, bend=root([e.bend for _, e in done]))
