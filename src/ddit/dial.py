"""One dial: a speed or a quality that is asked for, in place of a threshold.

A speed becomes a number of steps at scale 1, at even distances in lambda: the rule puts them less evenly, and uneven
distances cost more than what it sees in the content is worth (docs/method.md). A quality becomes a threshold, by what
`ddit calibrate` measured once on the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddit.config import ScheduleConfig
from ddit.patches import half_log_snr
from ddit.schedule import Moment

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
        """The largest threshold whose pictures are expected to be as near to plain's as ``psnr`` dB."""
        likeness = np.minimum.accumulate(self.psnr)[::-1]
        if psnr > likeness[-1]:
            return 0.0
        return float(np.exp(np.interp(psnr, likeness, np.log(self.thresholds)[::-1])))


class Budget:
    """As many steps at scale 1 as ``1 / config.speedup`` of a plain run pays for, the largest patches in between.

    They lie at even distances in lambda, in which velocities change evenly (`ddit.patches.half_log_snr`). The first is
    due one distance after the warm-up, and half of one remains after the last.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.begin = self.last = 0.0

    def choose(self, moment: Moment) -> list[int]:
        if moment.total is None:
            raise ValueError(
                "a speedup needs the number of steps, which only a pipeline knows; "
                "apply ddit to the pipeline, or give a threshold"
            )
        if moment.step == 0:
            self._check(moment.total, min(moment.costs.values()))
        if moment.step < self.config.warmup:
            return [self.config.warmup_scale] * len(moment.stats)
        passed = self._passed(moment, moment.total)
        return [self._one(moment, moment.total, passed, spent) for spent in moment.spent]

    def _passed(self, moment: Moment, total: int) -> float:
        """Share of the way in lambda, from the warm-up on, that lies behind when this step is over.

        Policies don't know the noise levels ahead: this step is taken to be as wide as the last, and those that are
        left as even in sigma.
        """
        here, end = half_log_snr(moment.sigma), half_log_snr(moment.sigma / (total - moment.step))
        if moment.step == self.config.warmup:
            self.begin = self.last = here
        after, self.last = 2 * here - self.last, here
        return (after - self.begin) / max(end - self.begin, 1e-9)

    def _one(self, moment: Moment, total: int, passed: float, spent: float) -> int:
        costs, config = moment.costs, self.config
        floor = min(costs.values())
        cheapest = min(costs, key=lambda s: (costs[s], s))
        budget, rest = total / config.speedup, total - moment.step - 1
        # Steps that compare look back once after the warm-up, which costs one more call.
        looks = config.anchored and config.gain > 0
        fine = (budget - (total + looks) * floor) / (1 - floor) - config.warmup
        done = round((spent - moment.step * floor) / (1 - floor) - config.warmup)
        scale = 1 if (fine + 0.5) * passed >= done + 1 else cheapest
        after = budget - spent - costs[scale]
        if after > rest + SLACK:
            return 1
        if after < rest * floor - SLACK:
            return cheapest
        return scale

    def _check(self, total: int, floor: float) -> None:
        looks = self.config.anchored and self.config.gain > 0
        most = total / (self.config.warmup + (total - self.config.warmup + looks) * floor)
        if self.config.speedup > most + 1e-9:
            warnings.warn(
                f"a speedup of {self.config.speedup:g} can't be reached with {total} steps, of which "
                f"{self.config.warmup} are warm-up: the most is {most:.2f}; take fewer steps instead, or gain 0",
                stacklevel=2,
            )
