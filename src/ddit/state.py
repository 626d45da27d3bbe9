"""One generation under way: recent latents, the decision of the current step, and the record of past ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ddit.anchor import Anchor
from ddit.config import ScheduleConfig
from ddit.patches import Line, amplified, expand, half_log_snr
from ddit.report import Step
from ddit.schedule import Moment, Policy, difference, difference_per_sigma, growth, project, statistics

Values = TypeVar("Values", Tensor, Line, Anchor)


def renewed(samples: Sequence[bool], new: Values, old: Values) -> Values:
    """``new`` for the chosen samples of a batch, ``old`` for the others."""
    if all(samples):
        return new
    if isinstance(new, Tensor):
        return torch.where(expand(torch.tensor(samples), new).bool(), new, cast(Tensor, old))
    pairs = ((getattr(new, f.name), getattr(old, f.name)) for f in fields(new))
    parts: list[Any] = [
        newer if newer is None or older is None else renewed(samples, newer, older) for newer, older in pairs
    ]
    return cast(Values, type(new)(*parts))


def spread(part: Tensor, samples: Sequence[int], batch: int, onto: Tensor | None = None) -> Tensor:
    """What is known of some samples ``[len(samples), ...]`` at their places in the batch, on what was there or zero."""
    if len(samples) == batch:
        return part
    under = part.new_zeros(batch, *part.shape[1:]) if onto is None else onto
    return under.index_put((torch.tensor(list(samples), device=part.device),), part)


@dataclass
class Answers:
    """What the coarse grid of one scale answered, for a whole batch."""

    line: Line
    """At the anchors."""
    newest: Line
    """Last answers."""
    age: dict[int, int]
    """Sample -> steps at scale 1 since its last answer. 0: ``line`` is to its present anchor."""


@dataclass
class Memory:
    """What one guidance pass keeps of each sample's last steps at scale 1, and of coarse steps since."""

    anchor: Anchor
    known: list[bool]
    """Per sample, whether there was a step at scale 1."""
    answers: dict[int, Answers] = field(default_factory=dict)
    learnt: Tensor | None = None
    """What an adapter that mends forecasts made of the anchors, for the whole batch."""
    mendable: set[int] = field(default_factory=set)
    """Samples whose present anchor it is about."""

    @classmethod
    def empty(cls, latents: Tensor, *, mended: bool = False) -> Memory:
        """Before the first step, for latents ``[B, C, ..., H, W]``.

        Args:
            mended: Whether an adapter will mend the forecasts.
        """
        zero = torch.zeros_like(latents, dtype=torch.float32)
        level = zero.new_zeros(len(zero))
        return cls(Anchor.after(zero, level, zero, end=level if mended else None), [False] * len(zero))

    def renew(
        self,
        samples: Sequence[bool],
        latents: Tensor,
        velocity: Tensor,
        sigma: float,
        end: float,
        hidden: Tensor | None = None,
    ) -> None:
        """A step at scale 1 from one noise level to another is the new anchor of these samples (see `Anchor`)."""
        noise = torch.full_like(self.anchor.sigma, sigma)
        until = None if self.anchor.step is None else torch.full_like(noise, end)
        before = self.anchor
        if not all(self.known):
            before = renewed(self.known, before, Anchor.after(latents, noise, velocity, end=until))
        new = Anchor.after(latents, noise, velocity, before, end=until, hidden=hidden)
        self.anchor = renewed(samples, new, self.anchor)
        self.known = [known or now for known, now in zip(self.known, samples, strict=True)]
        self.mendable -= {i for i, now in enumerate(samples) if now}
        for answers in self.answers.values():
            answers.age = {i: age + samples[i] for i, age in answers.age.items()}

    def unasked(self, scale: int, samples: Sequence[int]) -> list[tuple[list[int], Line | None]]:
        """Samples whose anchor does not lie between two answers: never asked, or not since the anchor before."""
        answers = self.answers.get(scale)
        if answers is None:
            return [(list(samples), None)]
        new = [i for i in samples if i not in answers.age]
        old = [i for i in samples if answers.age.get(i, 0) > 1]
        return [(rows, line) for rows, line in ((new, None), (old, answers.line.rows(old))) if rows]

    def mended(self, samples: Sequence[int], learn: Callable[[Anchor], Tensor]) -> tuple[Anchor, list[int]]:
        """The anchor of some samples with what an adapter makes of it, and for which of them that was new."""
        new = [i for i in samples if i not in self.mendable]
        if new:
            self.learnt = spread(learn(self.anchor.rows(new)), new, len(self.known), self.learnt)
            self.mendable |= set(new)
        assert self.learnt is not None
        rows = list(samples)
        learnt = self.learnt if len(rows) == len(self.known) else self.learnt[rows]
        return replace(self.anchor.rows(rows), learnt=learnt), new

    def asked(self, scale: int, samples: Sequence[int], line: Line) -> None:
        """The coarse grid has been asked at the anchor of some samples, ``[len(samples), ...]``."""
        self._keep(scale, samples, line, Line.through(line.value, line.level))

    def line(self, scale: int, samples: Sequence[int], level: Tensor, answer: Tensor) -> Line:
        """Keep an answer ``[len(samples), ...]``, and give the line of the samples' answers at their anchors.

        An anchor between two answers was not asked for one: it lies on the line through them.
        """
        answers = self.answers[scale]
        line, newest = answers.line.rows(samples), Line.through(answer.detach(), level, answers.newest.rows(samples))
        between = [answers.age[i] == 1 for i in samples]
        if any(between):
            anchor = self.anchor.velocity.level[list(samples)]
            line = renewed(between, Line.through(newest.at(anchor), anchor, line), line)
        self._keep(scale, samples, line, newest)
        return line

    def _keep(self, scale: int, samples: Sequence[int], line: Line, newest: Line) -> None:
        old, age = self.answers.get(scale), dict.fromkeys(samples, 0)
        if len(samples) < len(self.known):
            zeros = Line(*(part.new_zeros(len(self.known), *part.shape[1:]) for part in line.parts))
            line = (old.line if old else zeros).replaced(samples, line)
            newest = (old.newest if old else zeros).replaced(samples, newest)
        self.answers[scale] = Answers(line, newest, {**(old.age if old else {}), **age})


@dataclass
class Generation:
    """State between two calls of the transformer. Letters as in `ddit.schedule`."""

    config: ScheduleConfig
    path: list[Tensor] = field(default_factory=list)
    """Latents of the last steps in float32, newest last: ``order + 1`` for plain differences, else one."""
    sigmas: list[float] = field(default_factory=list)
    seen: Tensor | None = None
    """The latents of the current step as the transformer got them."""
    passes: int = 0
    """Guidance passes of the current step that are answered."""
    velocities: list[Tensor] = field(default_factory=list)
    """Their answers, where the next step of the path has to be projected onto them."""
    memories: list[Memory] = field(default_factory=list)
    """One per guidance pass."""
    nodes: list[Tensor] = field(default_factory=list)
    """Velocities ``[B, C, ..., H, W]`` of the path in each sample's last ``order`` steps at scale 1, newest last."""
    levels: list[list[float]] = field(default_factory=list)
    """Per sample, lambda (`ddit.patches.half_log_snr`) of these, fewer where there were not as many yet."""
    measured: list[dict[int, float]] = field(default_factory=list)
    """Per sample, scale -> statistic at the newest node."""
    owed: list[float] = field(default_factory=list)
    """Per sample, what forecasts since its last step at scale 1 add to the latents, the current step's among them, if
    the statistic stayed what was measured: a sum of `ddit.schedule.growth` times steps of sigma."""
    scales: list[int] = field(default_factory=list)
    """Decision for the current step, one scale per sample."""
    steps: list[Step] = field(default_factory=list)
    """Record of all steps, the current one last."""
    borrowed: set[int] = field(default_factory=set)
    """Samples that a cache answered for in the current call."""
    doubtful: set[int] = field(default_factory=set)
    """The same of all guidance passes of the current step: what a cache says is no evidence of what has changed."""
    examples: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Scale -> arguments of one sample's call without data: from these, costs are counted when asked for."""
    run: list[float] = field(default_factory=list)
    """Noise levels of all steps; empty where nobody knows."""
    costs: dict[int, float] = field(default_factory=dict)
    """Scale -> work of a step after an anchor, in steps at scale 1; only where a budget needs it."""
    gap: float = 0.0
    """Work of an adapter that mends forecasts for each gap, in the same; likewise."""
    mended: bool = False
    """Whether an adapter mends forecasts without asking the model."""
    hidden: Tensor | None = None
    """What the model's last layer read in the current call ``[B, N, width]``, for such an adapter."""
    path_flops: int = 0
    """FLOPs of what it makes of one sample's step at scale 1."""
    forced: str | None = None
    """Why some steps had to stay at scale 1, or ``None``."""

    def finished(self) -> Generation:
        """The same record without the latents."""
        kept = {name: getattr(self, name) for name in ("steps", "examples", "path_flops", "forced")}
        return Generation(self.config, **kept)

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
        stats = self._look(z, sigma, patch_size, blind=getattr(policy, "blind", False))
        self.velocities, self.passes, self.doubtful = [], 0, set()
        moment = Moment(len(self.steps), total, stats, sigma, self.run, self.costs, self.gap)
        chosen, allowed = policy.choose(moment), self.config.scales
        if not isinstance(chosen, Sequence) or len(chosen) != len(z) or any(s not in allowed for s in chosen):
            raise ValueError(f"the policy chose {chosen!r} for {len(z)} samples; allowed are scales of {allowed}")
        self.scales = list(chosen)
        self.steps.append(Step(sigma, tuple(self.scales), tuple(stats), 0.0))
        return self.scales

    def _look(self, z: Tensor, sigma: float, patch_size: int, *, blind: bool) -> list[dict[int, float]]:
        """Take in the latents of a new step: per sample, scale -> statistic, which a blind policy has no use for."""
        if blind:
            self.seen, self.sigmas = z.clone(), [sigma]
            return [{} for _ in z]
        self._follow(z, sigma)
        plain, keep = self.config.difference == "plain", self.config.order + 1
        self.sigmas = [*self.sigmas, sigma][-keep:]
        self.path = self.path[-keep if plain else -1 :]
        return self._plain_statistics(len(z), patch_size) if plain else self._expected_statistics(patch_size)

    def _plain_statistics(self, batch: int, patch_size: int) -> list[dict[int, float]]:
        """Per sample, scale -> statistic of the latents' difference, once there are enough latents."""
        if len(self.path) <= self.config.order:
            return [{} for _ in range(batch)]
        values = difference(self.path, self.config.order)
        return statistics(values, patch_size, self.config.scales, self.config.percentile)

    def _expected_statistics(self, patch_size: int) -> list[dict[int, float]]:
        """Per sample, scale -> what forecasts up to and with this step will have made of the difference per sigma."""
        order, here = self.config.order, self.sigmas[-1]
        fine = self._fine()
        new = [i for i, at_one in enumerate(fine) if at_one and len(self.levels[i]) == order]
        if new:
            nodes = self.nodes if len(new) == len(fine) else [v[new] for v in self.nodes]
            values = difference_per_sigma(nodes, [self.levels[i] for i in new])
            rows = statistics(values, patch_size, self.config.scales, self.config.percentile)
            for i, row in zip(new, rows, strict=True):
                self.measured[i], self.owed[i] = row, 0.0
        end = self._end(len(self.steps) + 1)
        for i, row in enumerate(self.measured):
            if row:
                self.owed[i] += (here - end) * growth(self.levels[i], half_log_snr(here))
        owed = [amplified(end) * x for x in self.owed]
        return [{s: x * value for s, value in row.items()} for x, row in zip(owed, self.measured, strict=True)]

    def _end(self, number: int) -> float:
        """Noise level where a step ends, counted from 1; where nobody knows, as far away as that of the step before."""
        if self.run:
            return next(iter(self.run[number:]), 0.0)
        return max(2 * self.sigmas[-1] - self.sigmas[-2], 0.0) if len(self.sigmas) > 1 else self.sigmas[-1]

    def force(self, tokens: Tensor, sigma: float) -> None:
        """Begin a step that has to run at scale 1 and whose latents can't be read; the path starts anew after it."""
        self.path, self.sigmas, self.memories = [], [sigma], []
        self.velocities, self.passes = [], 0
        self._forget_nodes(len(tokens))
        self.seen, self.scales = tokens.clone(), [1] * len(tokens)
        self.borrowed, self.doubtful = set(), set()
        self.steps.append(Step(sigma, tuple(self.scales), tuple({} for _ in tokens), 0.0))

    def memory(self) -> Memory:
        """Of the guidance pass that is next to be answered."""
        while len(self.memories) <= self.passes:
            self.memories.append(Memory.empty(self._seen, mended=self.mended))
        return self.memories[self.passes]

    def compared(self, samples: Sequence[int]) -> None:
        """Record a further call on the coarse grid in this step; guidance passes count once, as for all costs."""
        if self.passes == 0:
            self.steps[-1] = replace(self.steps[-1], compared=self.steps[-1].compared | set(samples))

    def heard(self, samples: Sequence[int], hidden: Tensor) -> None:
        """Keep what the model's last layer read in a call at scale 1 ``[len(samples), N, width]``."""
        self.hidden = spread(hidden, samples, len(self.scales))

    def learnt(self, samples: Sequence[int]) -> None:
        """Record that an adapter looked at these samples' last step at scale 1; passes count once, as for all costs."""
        if samples and self.passes == 0:
            self.steps[-1] = replace(self.steps[-1], learnt=self.steps[-1].learnt | set(samples))

    def skipped(self, samples: Sequence[int]) -> None:
        """Record that the model was not asked for these samples in this step."""
        self.steps[-1] = replace(self.steps[-1], skipped=self.steps[-1].skipped | set(samples))

    def reused(self, samples: Sequence[int]) -> None:
        """Record that a cache answered for these samples in this call; as costs, guidance passes count once."""
        self.borrowed |= set(samples)
        self.doubtful |= set(samples)
        if self.passes == 0:
            self.steps[-1] = replace(self.steps[-1], reused=self.steps[-1].reused | set(samples))

    def record(self, velocity: Tensor, seconds: float) -> None:
        """Keep the answer ``[B, C, ..., H, W]`` to a call, from which later steps with large patches start."""
        fine = [scale == 1 and i not in self.borrowed for i, scale in enumerate(self.scales)]
        if self.config.anchored and any(fine) and max(self.config.scales) > 1:
            end, latents = self._end(len(self.steps)), self._seen.float()
            self.memory().renew(fine, latents, velocity.float(), self.sigmas[-1], end, self.hidden)
        self.borrowed, self.hidden = set(), None
        if self.path and self._seen.dtype != torch.float32:
            self.velocities.append(velocity)
        self.passes += 1
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
        elif not self.levels:
            self._forget_nodes(len(z))
        self.path.append(here)
        self.seen = here if exact else z.clone()

    def _forget_nodes(self, batch: int) -> None:
        """Nothing is known yet of what forecasts of these samples will be off by."""
        self.nodes, self.levels = [], [[] for _ in range(batch)]
        self.measured, self.owed = [{} for _ in range(batch)], [0.0] * batch

    def _add_node(self, step: Tensor, sigma: float) -> None:
        """The path's velocity over the last step joins the nodes of the samples that took it at scale 1."""
        fine, order, last = self._fine(), self.config.order, self.sigmas[-1]
        level = half_log_snr(last)
        if self.config.difference == "plain" or not any(fine) or sigma >= last:
            return
        new = step / (sigma - last)
        nodes = self.nodes or [new] * order
        self.nodes = [renewed(fine, newer, older) for older, newer in zip(nodes, [*nodes[1:], new], strict=True)]
        self.levels = [[*old, level][-order:] if at_one else old for old, at_one in zip(self.levels, fine, strict=True)]

    def _fine(self) -> list[bool]:
        """Per sample, whether the model itself answered the last step, at scale 1."""
        last = self.steps[-1].scales if self.steps else ()
        return [scale == 1 and i not in self.doubtful for i, scale in enumerate(last)]

    def _like(self, z: Tensor) -> bool:
        return z.shape == self._seen.shape and z.dtype == self._seen.dtype and z.device == self._seen.device

    @property
    def _seen(self) -> Tensor:
        assert self.seen is not None, "a step has begun"
        return self.seen
