"""One generation under way: recent latents, the decision of the current step, and the record of past ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ddit.config import ScheduleConfig
from ddit.models.base import Anchor
from ddit.patches import expand
from ddit.report import Step
from ddit.schedule import Policy, difference, difference_per_sigma, project, statistics


def renewed(samples: Sequence[bool], new: Tensor, old: Tensor) -> Tensor:
    """``new`` for the chosen samples of a batch, ``old`` for the others."""
    if all(samples):
        return new
    return torch.where(expand(torch.tensor(samples), new).bool(), new, old)


@dataclass
class Memory:
    """What one guidance pass keeps of each sample's last step at scale 1."""

    anchor: Anchor
    known: list[bool]
    """Per sample, whether there was such a step."""
    before: dict[int, Tensor] = field(default_factory=dict)
    """Scale -> what the coarse grid says at the anchor, `ddit.models.base.Architecture.before`."""
    asked: dict[int, set[int]] = field(default_factory=dict)
    """Scale -> samples of which ``before`` holds the answer."""

    def renew(self, samples: Sequence[bool], latents: Tensor, velocity: Tensor, sigma: float) -> None:
        """A step at scale 1 is the new anchor of these samples."""
        old, level = self.anchor, torch.full_like(self.anchor.sigma, sigma)
        self.anchor = Anchor(
            renewed(samples, latents, old.latents),
            renewed(samples, velocity, old.velocity),
            renewed(samples, level, old.sigma),
        )
        new = {i for i, at_one in enumerate(samples) if at_one}
        self.known = [known or i in new for i, known in enumerate(self.known)]
        self.asked = {scale: asked - new for scale, asked in self.asked.items()}

    def unasked(self, scale: int, samples: Sequence[int]) -> list[int]:
        """Those samples whose ``before`` is missing at a scale."""
        return [i for i in samples if i not in self.asked.get(scale, set())]

    def remember(self, scale: int, samples: Sequence[int], low: Tensor) -> None:
        """Keep ``before`` of some samples, ``[len(samples), ...]``."""
        if scale not in self.before:
            self.before[scale] = low.new_zeros(len(self.known), *low.shape[1:])
        self.before[scale][list(samples)] = low
        self.asked.setdefault(scale, set()).update(samples)


@dataclass
class Generation:
    """State between two calls of the transformer. Letters as in `ddit.schedule`."""

    config: ScheduleConfig
    path: list[Tensor] = field(default_factory=list)
    """Latents of the last steps in float32, newest last: ``order + 1`` for plain differences, else one."""
    sigmas: list[float] = field(default_factory=list)
    seen: Tensor | None = None
    """The latents of the current step as the transformer got them."""
    velocities: list[Tensor] = field(default_factory=list)
    """Answers of the current step, one per guidance pass."""
    memories: list[Memory] = field(default_factory=list)
    """One per guidance pass."""
    nodes: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Velocity ``[B, C, ..., H, W]`` of the path and noise level ``[B]`` of each sample's last ``order`` steps at
    scale 1, newest last."""
    counts: list[int] = field(default_factory=list)
    """How many of these each sample has had."""
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
        self._follow(z, sigma)
        plain, keep = self.config.difference == "plain", self.config.order + 1
        self.sigmas = [*self.sigmas, sigma][-keep:]
        self.path = self.path[-keep if plain else -1 :]
        stats = self._statistics(len(z), patch_size, plain)
        chosen, allowed = policy.choose(len(self.steps), total, stats, self._coarse(len(z))), self.config.scales
        if not isinstance(chosen, Sequence) or len(chosen) != len(z) or any(s not in allowed for s in chosen):
            raise ValueError(f"the policy chose {chosen!r} for {len(z)} samples; allowed are scales of {allowed}")
        self.scales = list(chosen)
        self.steps.append(Step(sigma, tuple(self.scales), tuple(stats), 0.0))
        return self.scales

    def _statistics(self, batch: int, patch_size: int, plain: bool) -> list[dict[int, float]]:
        """Per sample, scale -> statistic, where there are enough latents or steps at scale 1."""
        order, scales, percentile = self.config.order, self.config.scales, self.config.percentile
        if plain:
            ready = list(range(batch)) if len(self.path) > order else []
            values = difference(self.path, order) if ready else None
        elif self.steps and 1 not in self.steps[-1].scales:
            return [dict(held) for held in self.steps[-1].statistics]
        else:
            ready = [i for i, count in enumerate(self.counts) if count >= order]
            nodes = [(v[ready], t[ready]) for v, t in self.nodes] if ready else []
            values = difference_per_sigma([v for v, _ in nodes], [t for _, t in nodes]) if ready else None
        stats: list[dict[int, float]] = [{} for _ in range(batch)]
        if values is not None:
            table = statistics(values, patch_size, scales, percentile)
            for row, sample in enumerate(ready):
                stats[sample] = {s: column[row] for s, column in table.items()}
        return stats

    def _coarse(self, batch: int) -> list[int]:
        """How many steps in a row each sample has run with large patches until now."""
        runs = [0] * batch
        for sample in range(batch):
            for step in reversed(self.steps):
                if step.scales[sample] == 1:
                    break
                runs[sample] += 1
        return runs

    def force(self, tokens: Tensor, sigma: float) -> None:
        """Begin a step that has to run at scale 1 and whose latents can't be read; the path starts anew after it."""
        self.path, self.sigmas, self.velocities, self.memories, self.nodes = [], [sigma], [], [], []
        self.counts = [0] * len(tokens)
        self.seen, self.scales = tokens.clone(), [1] * len(tokens)
        self.steps.append(Step(sigma, tuple(self.scales), tuple({} for _ in tokens), 0.0))

    def memory(self) -> Memory:
        """Of the guidance pass that is next to be answered."""
        while len(self.memories) <= len(self.velocities):
            empty = torch.zeros_like(self._seen, dtype=torch.float32)
            nothing = Anchor(empty, empty, empty.new_zeros(len(empty)))
            self.memories.append(Memory(nothing, [False] * len(empty)))
        return self.memories[len(self.velocities)]

    def compared(self, samples: Sequence[int]) -> None:
        """Record a further call on the coarse grid in this step; guidance passes count once, as for all costs."""
        if not self.velocities:
            self.steps[-1] = replace(self.steps[-1], compared=self.steps[-1].compared | set(samples))

    def record(self, velocity: Tensor, seconds: float) -> None:
        """Keep the answer ``[B, C, ..., H, W]`` to a call, from which later steps with large patches start."""
        if self.config.anchored and 1 in self.scales and max(self.config.scales) > 1:
            fine = [scale == 1 for scale in self.scales]
            self.memory().renew(fine, self._seen.float(), velocity.float(), self.sigmas[-1])
        self.velocities.append(velocity)
        self.add_seconds(seconds)

    def add_seconds(self, seconds: float) -> None:
        """Count time towards the current step."""
        self.steps[-1] = replace(self.steps[-1], seconds=self.steps[-1].seconds + seconds)

    def _follow(self, z: Tensor, sigma: float) -> None:
        """Append to the path. Latents below float32 are rounded, so their step is projected (see `project`)."""
        exact = z.dtype == torch.float32
        here = z.to(torch.float32, copy=True)
        if self.path:
            step = here - self._seen.float()
            if not exact:
                step = project(step, self.velocities) if self.velocities else step
                here = self.path[-1] + step
            self._add_node(step, sigma)
        self.path.append(here)
        self.seen = here if exact else z.clone()
        self.velocities = []

    def _add_node(self, step: Tensor, sigma: float) -> None:
        """The path's velocity over the last step joins the nodes of the samples that took it at scale 1."""
        fine = [scale == 1 for scale in self.steps[-1].scales]
        if self.config.difference == "plain" or not any(fine) or sigma >= self.sigmas[-1]:
            return
        if not self.counts:
            self.counts = [0] * len(fine)
        self.counts = [count + at_one for count, at_one in zip(self.counts, fine, strict=True)]
        new = (step / (sigma - self.sigmas[-1]), step.new_full((len(step),), self.sigmas[-1]))
        nodes = self.nodes or [new] * self.config.order
        self.nodes = [
            (renewed(fine, newer[0], older[0]), renewed(fine, newer[1], older[1]))
            for older, newer in zip(nodes, [*nodes[1:], new], strict=True)
        ]

    def _like(self, z: Tensor) -> bool:
        return z.shape == self._seen.shape and z.dtype == self._seen.dtype and z.device == self._seen.device

    @property
    def _seen(self) -> Tensor:
        assert self.seen is not None, "a step has begun"
        return self.seen
