"""What coarse steps and forecasts are off by along a model's plain runs: the profile that plans are made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddit.coarse import coarse_step
from ddit.config import Coarse
from ddit.models.base import Architecture, Inputs, Noisy
from ddit.patches import period
from ddit.pipelines.generate import guided_error
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


class Pass(NamedTuple):
    """One guidance pass of a step."""

    inputs: Inputs
    """Arguments of the call."""
    noisy: Noisy
    """What they are about."""
    velocity: Tensor
    """What the model answered, float32."""


def passes(architecture: Architecture, calls: Sequence[tuple[Inputs, Tensor]]) -> list[list[Pass]]:
    """Of each step of a run its guidance passes in order, as many as every step has.

    Args:
        calls: The transformer's, in order (`ddit.pipelines.generate.recorded`).
    """
    steps: dict[float, list[Pass]] = {}
    for inputs, answer in calls:
        noisy = architecture.read(inputs)
        velocity = architecture.velocity(answer, noisy.latents.shape[2:]).float()
        steps.setdefault(float(architecture.sigma(inputs)[0]), []).append(Pass(inputs, noisy, velocity))
    fewest = min(map(len, steps.values()))
    return [steps[sigma][:fewest] for sigma in sorted(steps, reverse=True)]


@torch.no_grad()
def measured_errors(
    architecture: Architecture, calls: Sequence[tuple[Inputs, Tensor]], scales: Sequence[int], guidance: float = 1.0
) -> Errors:
    """Along a plain run, of what guidance makes of its passes.

    Args:
        calls: The transformer's, in order (`ddit.pipelines.generate.recorded`).
        scales: Above 1.
        guidance: Scale of guidance in two passes (`ddit.pipelines.generate.guidance_scale`).
    """
    steps = passes(architecture, calls)
    sigmas = [float(step[0].noisy.sigma[0]) for step in steps]

    forward = architecture.transformer.forward

    def coarse(i: int, scale: int) -> list[Tensor]:
        return [coarse_step(architecture, forward, one.inputs, one.noisy, scale, Coarse()) for one in steps[i]]

    def forecasts(i: int) -> list[Tensor]:
        known = zip(steps[i - 2 * APART], steps[i - APART], steps[i], strict=True)
        return [_forecast(earlier, last, one) for earlier, last, one in known]

    def off(i: int, answers: Sequence[Tensor]) -> float:
        """Of answers in place of a step's own. Passes that are stacked in one call are of one answer."""
        count = period(steps[i][0].noisy.latents)
        pairs = zip(answers, steps[i], strict=True)
        parts = [part for answer, one in pairs for part in (answer - one.velocity).split(count)]
        return float(guided_error(parts, guidance).mean())

    nearest = (min(range(len(sigmas)), key=lambda i, level=level: abs(sigmas[i] - level)) for level in LEVELS)
    chosen = sorted({i for i in nearest if i >= 2 * APART})
    distances = [half_log_snr(sigmas[i]) - half_log_snr(sigmas[i - APART]) for i in chosen]
    return Errors(
        [sigmas[i] for i in chosen],
        {scale: [off(i, coarse(i, scale)) for i in chosen] for scale in scales},
        [off(i, forecasts(i)) / distance**4 for i, distance in zip(chosen, distances, strict=True)],
    )


def _forecast(earlier: Pass, last: Pass, at: Pass) -> Tensor:
    """What two answers make of a third."""
    reference = None
    for known in (earlier, last):
        latents, sigma = known.noisy.latents.float(), known.noisy.sigma.float()
        reference = Reference.after(latents, sigma, known.velocity, reference)
    assert reference is not None, "of two steps"
    return reference.forecast(at.noisy.latents, at.noisy.sigma.float())


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
