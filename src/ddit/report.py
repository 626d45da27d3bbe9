"""What ran: the scale of every step and sample, and what that saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    """One denoising step of a batch."""

    sigma: float
    """Noise level, from 1 (noise) to 0 (picture)."""
    scales: tuple[int, ...]
    """Scale of each sample: 1 is a full step, more a coarse step, 0 a skipped one, in which the model is not called."""
    statistics: tuple[Mapping[int, float], ...]
    """Per sample, scale -> statistic of the rule; empty where there were too few latents."""
    seconds: float
    """Host time inside the transformer's calls of this step, all guidance passes together."""
    shares: tuple[float, ...] = ()
    """Of each sample's guidance passes, the share in which the model was called; empty where that is as ``scales`` say.
    A pass that comes back after a pause can't be forecast, and is called where others are skipped."""
    reused: Mapping[int, float] = field(default_factory=dict)
    """Sample -> share of its guidance passes in which a cache answered, where one did."""

    def share(self, sample: int) -> float:
        """Of a sample's guidance passes, the share that its scale's cost is to be paid for."""
        return self.shares[sample] if self.shares else 1.0

    def paid(self, sample: int, reused_share: float) -> float:
        """The same, where the cost of a call that a cache answers is this share of the whole call's."""
        return self.share(sample) - self.reused.get(sample, 0.0) * (1 - reused_share)


@dataclass(frozen=True)
class Report:
    """One generation, finished or under way. Costs are those of one sample, in closed form (`ddit.models.flops`)."""

    steps: tuple[Step, ...]
    tokens: Mapping[int, int]
    """Picture tokens of one sample at each scale that ran, and at scale 1."""
    flops: Mapping[int, float]
    """Floating-point operations of one forward of one sample at each of these scales."""
    forced: str | None = None
    """Why some steps had to stay at scale 1, or ``None``."""
    reused_share: float = 0.0
    """What a call costs in which a cache answers, as a fraction of the whole call."""
    asked: float | None = None
    """The speedup that was asked for; what was got is ``1 / flops_fraction``."""

    @property
    def scales(self) -> list[list[int]]:
        """Scales per sample: ``scales[sample][step]``; 0 where the model was not called."""
        return [list(column) for column in zip(*(step.scales for step in self.steps), strict=True)]

    @property
    def counts(self) -> dict[int, int]:
        """Scale -> number of steps of all samples together: 1 full, more coarse, 0 skipped."""
        return dict(sorted(Counter(scale for step in self.steps for scale in step.scales).items()))

    @property
    def tokens_fraction(self) -> float:
        """Picture tokens processed, as a fraction of those of a plain run."""
        return self._fraction(self.tokens)

    @property
    def flops_fraction(self) -> float:
        """Floating-point operations, as a fraction of those of a plain run."""
        return self._fraction(self.flops)

    @property
    def flops_fractions(self) -> list[float]:
        """`flops_fraction` of each sample."""
        return [self._fraction(self.flops, [i]) for i in range(len(self.steps[0].scales))]

    @property
    def seconds(self) -> float:
        """Host time inside the transformer's calls."""
        return sum(step.seconds for step in self.steps)

    def _fraction(self, costs: Mapping[int, float], samples: Sequence[int] | None = None) -> float:
        chosen = range(len(self.steps[0].scales)) if samples is None else samples
        spent = [
            {0: 0, **costs}[step.scales[i]] * step.paid(i, self.reused_share) for step in self.steps for i in chosen
        ]
        return sum(spent) / (len(spent) * costs[1])

    def remark(self, *, skipping: bool) -> str | None:
        """What to do about a run that took more than a step's work above what was asked; else ``None``.

        Args:
            skipping: Whether steps may be skipped.
        """
        fraction, asked = self.flops_fraction, self.asked or 1.0
        if len(self.steps) * (fraction - 1 / asked) <= 1:
            return None
        why = (
            "large patches serve too few of its steps. Skip steps as well (skip=SkipSchedule(speedup=...), --speedup), "
            "or train an adapter for more noise levels"
        )
        if skipping:
            why = (
                "a forecast needs two answers with one patch size, so steps can't be skipped where patches change. "
                "Let them change less often, or ask for less"
            )
        return f"a speedup of {asked:g} was asked for, and the run got {1 / fraction:.2f}: {why}"

    def strip(self, sample: int = 0) -> str:
        """The schedule of one sample on a line, such as ``1 1 1 4 (4) 2 - 1``.

        ``-`` where the step was skipped, in brackets where a cache answered.
        """
        return " ".join(_mark(step, sample) for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "scales": self.scales,
            "counts": {_name(scale): count for scale, count in self.counts.items()},
            "reused": [sorted(step.reused) for step in self.steps],
            "sigmas": [step.sigma for step in self.steps],
            "statistics": [[dict(sample) for sample in step.statistics] for step in self.steps],
            "step_seconds": [step.seconds for step in self.steps],
            "tokens": dict(self.tokens),
            "flops": dict(self.flops),
            "tokens_fraction": self.tokens_fraction,
            "flops_fraction": self.flops_fraction,
            "seconds": self.seconds,
            "forced": self.forced,
            "asked_speedup": self.asked,
        }

    def __repr__(self) -> str:
        samples = self.scales
        coarse = {} if any(scale > 1 for scale in self.counts) else {2: 0}
        shown_counts = dict(sorted({**self.counts, **coarse}.items()))
        shown = [f"  {i}: {self.strip(i)}" for i in range(min(len(samples), 8))]
        if len(samples) > 8:
            shown.append(f"  ... {len(samples) - 8} more")
        lines = [
            f"Report({len(self.steps)} steps, {len(samples)} samples, {self.seconds:.2f} s in the transformer)",
            f"  tokens {self.tokens_fraction:.1%}, FLOPs {self.flops_fraction:.1%} of a plain run",
            "  "
            + ", ".join(f"{count} {_name(scale)}" for scale, count in shown_counts.items())
            + (" steps" if len(samples) == 1 else " steps of all samples"),
            *([f"  asked for {self.asked:g}x less work, got {1 / self.flops_fraction:.2f}x"] if self.asked else []),
            *([f"  held at full steps: {self.forced}"] if self.forced else []),
            *shown,
        ]
        return "\n".join(lines)

    def plot(self, path: str | Path, *, threshold: float | None = None, sample: int = 0) -> None:
        """Plot scale against the step, and the statistic where it was measured (needs matplotlib, extra ``plot``).

        Args:
            path: Picture file; its ending names the format.
            threshold: Drawn as a line if given.
        """
        from matplotlib.figure import Figure

        curves = [dict(step.statistics[sample]) for step in self.steps]
        measured = sorted({s for curve in curves for s in curve})
        figure = Figure(figsize=(8, 4.5 if measured else 1.8), layout="constrained")
        heights = (2, 1) if measured else (1,)
        axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
        top, bottom = axes[0, 0], axes[-1, 0]
        for scale in measured:
            points = [(i, curve[scale]) for i, curve in enumerate(curves) if scale in curve]
            top.plot(*zip(*points, strict=True), marker=".", label=f"statistic of {scale}p")
        if measured:
            if threshold:
                top.axhline(threshold, color="black", linestyle="--", label=f"threshold {threshold:g}")
            top.set_yscale("log")
            top.set_ylabel("deviation of the difference")
            top.legend()
        scales = self.scales[sample]
        bottom.step(range(len(scales)), [_rung(s) for s in scales], where="mid")
        rungs = sorted({1, *scales})
        bottom.set_yticks([_rung(s) for s in rungs], [_name(s) for s in rungs])
        bottom.set_xlabel("step")
        figure.savefig(path, dpi=120)


def _mark(step: Step, sample: int) -> str:
    scale = step.scales[sample]
    if scale == 0:
        return "-"
    return f"({scale})" if sample in step.reused else str(scale)


def _name(scale: int) -> str:
    return {0: "skipped", 1: "full"}.get(scale, f"coarse {scale}p")


def _rung(scale: int) -> int:
    """Height of a scale in the plot: -1 skipped, 0 full, one more for each doubling."""
    return -1 if scale == 0 else scale.bit_length() - 1
