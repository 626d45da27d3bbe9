"""What ran: the scale of every step and sample, and what that saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    """One denoising step of a batch."""

    sigma: float
    """Noise level, from 1 (noise) to 0 (picture)."""
    scales: tuple[int, ...]
    """Scale of each sample."""
    statistics: tuple[Mapping[int, float], ...]
    """Per sample, scale -> statistic of the rule; empty where there were too few latents."""
    seconds: float
    """Host time inside the transformer's calls of this step, all guidance passes together."""
    compared: frozenset[int] = frozenset()
    """Samples for which the coarse grid was also asked at the last step at scale 1, to see what has changed since."""
    skipped: frozenset[int] = frozenset()
    """Samples for which the model was not asked at all (`ddit.ScheduleConfig.gain`)."""
    reused: frozenset[int] = frozenset()
    """Samples for which a cache answered."""
    learnt: frozenset[int] = frozenset()
    """Samples for which an adapter that mends forecasts looked at the last step at scale 1."""

    def calls(self, sample: int, reused_share: float = 0.0) -> float:
        """Calls of the model for a sample at its scale; one that a cache answers counts as a share."""
        asked = 0.0 if sample in self.skipped else reused_share if sample in self.reused else 1.0
        return asked + (sample in self.compared)


@dataclass(frozen=True)
class Report:
    """One generation, finished or under way. Costs are counted by PyTorch, per forward of one sample."""

    steps: tuple[Step, ...]
    tokens: Mapping[int, int]
    """Picture tokens of one sample at each scale that ran, and at scale 1."""
    flops: Mapping[int, int]
    """Floating-point operations of one forward of one sample at each of these scales."""
    forced: str | None = None
    """Why some steps had to stay at scale 1, or ``None``."""
    reused_share: float = 0.0
    """What a call costs in which a cache answers, as a fraction of the whole call."""
    asked: float | None = None
    """The speedup that was asked for; what was got is ``1 / flops_fraction``."""
    path_flops: int = 0
    """Floating-point operations of an adapter that mends forecasts, for one sample and all forecasts of a gap."""

    @property
    def scales(self) -> list[list[int]]:
        """Scales per sample: ``scales[sample][step]``."""
        return [list(column) for column in zip(*(step.scales for step in self.steps), strict=True)]

    @property
    def tokens_fraction(self) -> float:
        """Picture tokens processed, as a fraction of those of a run at scale 1."""
        return self._fraction(self.tokens)

    @property
    def flops_fraction(self) -> float:
        """Floating-point operations, as a fraction of those of a run at scale 1."""
        return self._fraction(self.flops, path=self.path_flops)

    @property
    def flops_fractions(self) -> list[float]:
        """`flops_fraction` of each sample."""
        return [self._fraction(self.flops, [i], self.path_flops) for i in range(len(self.steps[0].scales))]

    @property
    def seconds(self) -> float:
        """Host time inside the transformer's calls."""
        return sum(step.seconds for step in self.steps)

    def _fraction(self, costs: Mapping[int, int], samples: Sequence[int] | None = None, path: int = 0) -> float:
        share = self.reused_share
        chosen = range(len(self.steps[0].scales)) if samples is None else samples
        spent = [
            costs[step.scales[i]] * step.calls(i, share) + path * (i in step.learnt)
            for step in self.steps
            for i in chosen
        ]
        return sum(spent) / (len(spent) * costs[1])

    def strip(self, sample: int = 0) -> str:
        """The schedule of one sample on a line, such as ``1 1 1 4 (4) 2 - 1``.

        ``-`` where the model was not asked, in brackets where a cache answered.
        """
        return " ".join(_mark(step, sample) for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "scales": self.scales,
            "skipped": [sorted(step.skipped) for step in self.steps],
            "reused": [sorted(step.reused) for step in self.steps],
            "sigmas": [step.sigma for step in self.steps],
            "statistics": [[dict(sample) for sample in step.statistics] for step in self.steps],
            "step_seconds": [step.seconds for step in self.steps],
            "tokens": dict(self.tokens),
            "flops": dict(self.flops),
            "path_flops": self.path_flops,
            "tokens_fraction": self.tokens_fraction,
            "flops_fraction": self.flops_fraction,
            "seconds": self.seconds,
            "forced": self.forced,
            "asked_speedup": self.asked,
        }

    def __repr__(self) -> str:
        samples = self.scales
        shown = [f"  {i}: {self.strip(i)}" for i in range(min(len(samples), 8))]
        if len(samples) > 8:
            shown.append(f"  ... {len(samples) - 8} more")
        lines = [
            f"Report({len(self.steps)} steps, {len(samples)} samples, {self.seconds:.2f} s in the transformer)",
            f"  tokens {self.tokens_fraction:.1%}, FLOPs {self.flops_fraction:.1%} of a run at scale 1",
            *([f"  asked for {self.asked:g}x less work, got {1 / self.flops_fraction:.2f}x"] if self.asked else []),
            *([f"  held at scale 1: {self.forced}"] if self.forced else []),
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
            top.plot(*zip(*points, strict=True), marker=".", label=f"statistic at scale {scale}")
        if measured:
            if threshold:
                top.axhline(threshold, color="black", linestyle="--", label=f"threshold {threshold:g}")
            top.set_yscale("log")
            top.set_ylabel("deviation of the difference")
            top.legend()
        scales = self.scales[sample]
        bottom.step(range(len(scales)), scales, where="mid")
        asked = [i for i, step in enumerate(self.steps) if sample not in step.skipped]
        if len(asked) < len(scales):
            bottom.plot(asked, [scales[i] for i in asked], "o", markersize=4, label="model asked")
            bottom.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0)
        bottom.set_yscale("log", base=2)
        bottom.set_yticks(sorted({1, *scales}), [str(s) for s in sorted({1, *scales})])
        bottom.set_ylabel("scale")
        bottom.set_xlabel("step")
        figure.savefig(path, dpi=120)


def _mark(step: Step, sample: int) -> str:
    if sample in step.skipped:
        return "-"
    return f"({step.scales[sample]})" if sample in step.reused else str(step.scales[sample])
