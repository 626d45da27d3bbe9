"""One dial: a speed or a quality that is asked for, in place of a threshold.

A speed becomes a number of steps at scale 1, where forecasts between them are expected to err least: what the rule
measures in each picture, taken for granted beforehand (docs/method.md). A quality becomes a threshold, by what `ddit
calibrate` measured once on the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddit.config import ScheduleConfig
from ddit.patches import amplified, half_log_snr
from ddit.schedule import Dynamic, First, Fixed, Moment, Policy

SLACK = 0.5
"""Steps at scale 1 by which a run may end off its budget: a step can't be halved."""


@dataclass(frozen=True, kw_only=True)
class Dial:
    """What thresholds made of a model's runs.

    Raises:
        ValueError: Where lists are not of one length, or thresholds don't rise.
    """

    thresholds: tuple[float, ...]
    """Rising."""
    psnr: tuple[float, ...]
    """Likeness to the plain run in dB, median over prompts, for each."""

    def __post_init__(self) -> None:
        for name in ("thresholds", "psnr"):
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
        if not len(self.thresholds) == len(self.psnr) > 1:
            raise ValueError("a dial needs as many psnr as thresholds, two at least")
        if list(self.thresholds) != sorted(set(self.thresholds)) or self.thresholds[0] <= 0:
            raise ValueError("a dial's thresholds must rise from above 0")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Dial:
        """The inverse of `dataclasses.asdict`."""
        return cls(**values)

    def threshold_of_quality(self, psnr: float) -> float:
        """The largest threshold whose pictures are expected to be as near to plain's as ``psnr`` dB.

        Warns of a quality outside of what was measured.
        """
        likeness = np.minimum.accumulate(self.psnr)[::-1]
        if psnr > likeness[-1]:
            warnings.warn(
                f"a quality of {psnr:g} dB is above {likeness[-1]:.1f}, the most that was measured: "
                "every step stays at scale 1",
                stacklevel=3,
            )
            return 0.0
        if psnr < likeness[0]:
            warnings.warn(
                f"a quality of {psnr:g} dB is below {likeness[0]:.1f}, the least that was measured, and that is taken; "
                "ask for a speedup to go farther",
                stacklevel=3,
            )
        return float(np.exp(np.interp(psnr, likeness, np.log(self.thresholds)[::-1])))


class Budget:
    """As many steps at scale 1 as ``1 / config.speedup`` of a plain run pays for, the largest patches in between."""

    blind = True

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.scales: list[int] = []

    def choose(self, moment: Moment) -> list[int]:
        if not moment.sigmas:
            raise ValueError(
                "a speedup needs the noise levels of the run, which only a pipeline knows; "
                "apply ddit to the pipeline, or give a threshold"
            )
        if moment.step == 0:
            self.scales = self.plan(moment.sigmas, moment.costs, moment.gap)
        return [self.scales[moment.step]] * len(moment.stats)

    def plan(self, sigmas: Sequence[float], costs: Mapping[int, float], gap: float = 0.0) -> list[int]:
        """Scales of a run, whose work comes as near to the budget as whole steps can.

        Args:
            costs, gap: See `ddit.schedule.Moment`.
        """
        config, total = self.config, len(sigmas)
        warmup = min(config.warmup, total)
        cheapest = min(costs, key=lambda s: (costs[s], s))
        # Steps that compare look back once after the warm-up, which costs one more call.
        looks = config.anchored and config.gain > 0
        spent, floor = warmup * costs[config.warmup_scale], costs[cheapest]

        def work(count: int) -> float:
            """Of a run with so many chosen steps at scale 1, each of which may begin a gap, as the warm-up does."""
            rest = total - warmup - count
            return spent + count * costs[1] + (rest + looks) * floor + min(count + 1, rest) * gap

        least = work(0)
        if config.speedup > total / least + 1e-9:
            warnings.warn(
                f"a speedup of {config.speedup:g} can't be reached with {total} steps, of which {warmup} are warm-up: "
                f"the most is {total / least:.2f}; take fewer steps instead, or gain 0",
                stacklevel=2,
            )
        count = min(range(total - warmup + 1), key=lambda count: (abs(work(count) - total / config.speedup), -count))
        fine = places(sigmas, warmup, count)
        rest = [1 if step in fine else cheapest for step in range(warmup, total)]
        return [config.warmup_scale] * warmup + rest


def places(sigmas: Sequence[float], warmup: int, count: int) -> set[int]:
    """Numbers of the steps at scale 1 after the warm-up for which the others' forecasts are expected to err least.

    A straight forecast is off by the square of its distance in lambda, in which velocities bend evenly. Those between
    two steps at scale 1 add up in the latents, each times its step in sigma, and grow until the picture is done
    (`ddit.patches.amplified`). Errors of different gaps know nothing of each other, so that their squares add up;
    dynamic programming over the gaps makes the sum least.

    Args:
        sigmas: Noise levels of all steps of a run, falling.
        warmup: Number of steps at its beginning that are not chosen, at least 1.
        count: Number of steps to choose, at most those after the warm-up.
    """
    total = len(sigmas)
    levels = np.array([half_log_snr(sigma) for sigma in sigmas])
    ends = [*sigmas[1:], 0.0]
    # Of a step at scale 1 (row) and a later step (column), then of the next one at scale 1 (column, the last is none).
    each = np.triu((levels - levels[:, None]) ** 2, 1) * np.subtract(sigmas, ends)
    errors = np.full((total, total + 1), np.inf)
    gaps = np.triu_indices(total)
    errors[:, 1:][gaps] = (each.cumsum(1) * [amplified(end) for end in ends])[gaps] ** 2

    least, before = errors[warmup - 1], []
    for _ in range(count):
        sums = least[:total, None] + errors
        before.append(sums.argmin(0))
        least = sums.min(0)
    chosen: list[int] = []
    for earlier in reversed(before):
        chosen.append(int(earlier[chosen[-1] if chosen else total]))
    return set(chosen)


POLICIES = {"dynamic": Dynamic, "fixed": Fixed, "first": First}


def make_policy(config: ScheduleConfig) -> Policy:
    """The policy that a config asks for."""
    return Budget(config) if config.speedup else POLICIES[config.policy](config)
