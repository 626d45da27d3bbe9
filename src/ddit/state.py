"""One generation under way: recent latents, the decision of the current step, and the record of past ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ddit.config import ScheduleConfig
from ddit.patches import expand
from ddit.report import Step
from ddit.schedule import Policy, difference, project, statistics


@dataclass
class Generation:
    """State between two calls of the transformer. Letters as in `ddit.schedule`."""

    config: ScheduleConfig
    path: list[Tensor] = field(default_factory=list)
    """Latents of the last ``order + 1`` steps in float32, newest last."""
    sigmas: list[float] = field(default_factory=list)
    seen: Tensor | None = None
    """The latents of the current step as the transformer got them."""
    velocities: list[Tensor] = field(default_factory=list)
    """Answers of the current step, one per guidance pass."""
    clean: list[Tensor] = field(default_factory=list)
    """Per guidance pass, the clean latents that each sample's last step at scale 1 predicted; zeros before."""
    scales: list[int] = field(default_factory=list)
    """Decision for the current step, one scale per sample."""
    steps: list[Step] = field(default_factory=list)
    """Record of all steps, the current one last."""
    examples: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Scale -> arguments of one sample's call without data: from these, costs are counted when asked for."""
    forced: str | None = None
    """Why some steps had to stay at scale 1, or ``None``."""

    def finished(self) -> Generation:
        """The same record without the latents."""
        return Generation(self.config, steps=self.steps, examples=self.examples, forced=self.forced)

    def repeats(self, z: Tensor, sigma: float) -> bool:
        """Whether a call is a further guidance pass of the current step: same noise level, same latents."""
        return bool(self.sigmas) and sigma == self.sigmas[-1] and self._like(z) and torch.equal(z, self._seen)

    def continues(self, z: Tensor, sigma: float) -> bool:
        """Whether a call belongs to this generation: the noise level does not rise, and the latents are alike.

        A forced call hands over tokens instead of latents; the two may follow each other.
        """
        if not self.sigmas:
            return True
        other_form = z.ndim != self._seen.ndim and len(z) == len(self._seen)
        return sigma <= self.sigmas[-1] and (self._like(z) or other_form)

    def decide(self, z: Tensor, sigma: float, policy: Policy, patch_size: int, total: int | None) -> list[int]:
        """Begin a step and choose the scale of each sample.

        Args:
            z: Latents ``[B, C, ..., H, W]`` as the transformer gets them.
            sigma: Their noise level.
            total: Number of steps, where known.
        """
        self._follow(z)
        keep = self.config.order + 1
        self.sigmas = [*self.sigmas, sigma][-keep:]
        self.path = self.path[-keep:]
        stats: list[dict[int, float]] = [{} for _ in range(len(z))]
        if len(self.path) == keep:
            d = difference(self.path, self.sigmas, order=self.config.order, kind=self.config.difference)
            table = statistics(d, patch_size, self.config.scales, self.config.percentile)
            stats = [{s: values[b] for s, values in table.items()} for b in range(len(z))]
            if self.config.switch == "hold" and self.steps:
                held = self.steps[-1].statistics
                stats = [now if self._steady(b) else dict(held[b]) for b, now in enumerate(stats)]
        chosen, allowed = policy.choose(len(self.steps), total, stats), self.config.scales
        if not isinstance(chosen, Sequence) or len(chosen) != len(z) or any(s not in allowed for s in chosen):
            raise ValueError(f"the policy chose {chosen!r} for {len(z)} samples; allowed are scales of {allowed}")
        self.scales = list(chosen)
        self.steps.append(Step(sigma, tuple(self.scales), tuple(stats), 0.0))
        return self.scales

    def _steady(self, sample: int) -> bool:
        """Whether the steps between the latents of the path all ran at one scale."""
        return len({step.scales[sample] for step in self.steps[-self.config.order :]}) == 1

    def force(self, tokens: Tensor, sigma: float) -> None:
        """Begin a step that has to run at scale 1 and whose latents can't be read; the path starts anew after it."""
        self.path, self.sigmas, self.velocities, self.clean = [], [sigma], [], []
        self.seen, self.scales = tokens.clone(), [1] * len(tokens)
        self.steps.append(Step(sigma, tuple(self.scales), tuple({} for _ in tokens), 0.0))

    def expect(self, guidance_pass: int) -> Tensor:
        """Clean latents predicted so far for a guidance pass, zeros where there are none."""
        while len(self.clean) <= guidance_pass:
            self.clean.append(torch.zeros_like(self._seen, dtype=torch.float32))
        return self.clean[guidance_pass]

    def record(self, velocity: Tensor, seconds: float) -> None:
        """Keep the answer ``[B, C, ..., H, W]`` to a call, and what it says of the clean latents at scale 1."""
        clean = self.expect(len(self.velocities))
        if 1 in self.scales:
            predicted = torch.add(self._seen.float(), velocity.float(), alpha=-self.sigmas[-1])
            scales = expand(torch.tensor(self.scales), clean)
            self.clean[len(self.velocities)] = torch.where(scales == 1, predicted, clean)
        self.velocities.append(velocity)
        self.add_seconds(seconds)

    def add_seconds(self, seconds: float) -> None:
        """Count time towards the current step."""
        self.steps[-1] = replace(self.steps[-1], seconds=self.steps[-1].seconds + seconds)

    def _follow(self, z: Tensor) -> None:
        """Append to the path. Latents below float32 are rounded, so their step is projected (see `project`)."""
        if self.path and z.dtype != torch.float32:
            step = z.float() - self._seen.float()
            step = project(step, self.velocities) if self.velocities else step
            self.path.append(self.path[-1] + step)
        else:
            self.path.append(z.to(torch.float32, copy=True))
        self.seen = self.path[-1] if z.dtype == torch.float32 else z.clone()
        self.velocities = []

    def _like(self, z: Tensor) -> bool:
        return z.shape == self._seen.shape and z.dtype == self._seen.dtype and z.device == self._seen.device

    @property
    def _seen(self) -> Tensor:
        assert self.seen is not None, "a step has begun"
        return self.seen
