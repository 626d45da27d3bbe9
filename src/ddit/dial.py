"""One dial: a speed or a quality that is asked for, in place of a threshold.

`ddit calibrate` measures once what several thresholds make of a model's runs. A speed becomes a number of steps at
scale 1, which lie where the rule puts them on average: on single runs it puts them less evenly, and uneven distances
cost more than what it sees in the content is worth (docs/method.md). A quality becomes a threshold.
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
        ValueError: Where lists are not of one length, or not in order.
    """

    thresholds: tuple[float, ...]
    """Rising."""
    fine_steps: tuple[float, ...]
    """Mean number of steps at scale 1 beyond the warm-up, for each of these."""
    psnr: tuple[float, ...]
    """Likeness to the plain run in dB, median over prompts, for each."""
    sigmas: tuple[float, ...]
    """Noise levels, falling."""
    taken: tuple[float, ...]
    """Share of the steps at scale 1 that lie before each of these, rising from 0 to 1."""

    def __post_init__(self) -> None:
        for name in ("thresholds", "fine_steps", "psnr", "sigmas", "taken"):
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
        if not len(self.thresholds) == len(self.fine_steps) == len(self.psnr) > 1:
            raise ValueError("a dial needs as many fine_steps and psnr as thresholds, two at least")
        if not len(self.sigmas) == len(self.taken) > 1:
            raise ValueError("a dial needs as many values of taken as sigmas, two at least")
        if list(self.thresholds) != sorted(set(self.thresholds)) or self.thresholds[0] <= 0:
            raise ValueError("a dial's thresholds must rise from above 0")
        if list(self.sigmas) != sorted(self.sigmas, reverse=True) or list(self.taken) != sorted(self.taken):
            raise ValueError("a dial's sigmas must fall and its values of taken rise")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Dial:
        """The inverse of `dataclasses.asdict`."""
        return cls(**values)

    def threshold_for(self, fine_steps: float) -> float:
        """The threshold that takes so many steps at scale 1 beyond the warm-up; the nearest end outside the table."""
        counts = np.minimum.accumulate(self.fine_steps)[::-1]
        return float(np.exp(np.interp(fine_steps, counts, np.log(self.thresholds)[::-1])))

    def threshold_of_quality(self, psnr: float) -> float:
        """The largest threshold whose pictures are expected to be as near to plain's as ``psnr`` dB."""
        likeness = np.minimum.accumulate(self.psnr)[::-1]
        if psnr > likeness[-1]:
            return 0.0
        return float(np.exp(np.interp(psnr, likeness, np.log(self.thresholds)[::-1])))

    def share(self, sigma: float) -> float:
        """Share of the steps at scale 1 that lie before a noise level."""
        return float(np.interp(-sigma, [-s for s in self.sigmas], self.taken))


class Budget:
    """As many steps at scale 1 as ``1 / config.speedup`` of a plain run pays for, the largest patches in between.

    They lie at even distances of how much the path changes: by the dial, or evenly in lambda without one. The first is
    due one distance after the warm-up, and half of one remains after the last.
    """

    def __init__(self, config: ScheduleConfig, dial: Dial | None) -> None:
        self.config = config
        self.dial = dial
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
        change = self._change(moment, moment.total)
        return [self._one(moment, moment.total, change, spent) for spent in moment.spent]

    def _change(self, moment: Moment, total: int) -> float:
        """Share of the change after the warm-up that has happened when this step is over, if it is like the last."""
        if self.dial:
            here, end = self.dial.share(moment.sigma), 1.0
        else:
            here, end = half_log_snr(moment.sigma), half_log_snr(moment.sigma / (total - moment.step))
        if moment.step == self.config.warmup:
            self.begin = self.last = here
        after, self.last = 2 * here - self.last, here
        return (after - self.begin) / max(end - self.begin, 1e-9)

    def _one(self, moment: Moment, total: int, change: float, spent: float) -> int:
        costs, config = moment.costs, self.config
        floor = min(costs.values())
        cheapest = min(costs, key=lambda s: (costs[s], s))
        budget, rest = total / config.speedup, total - moment.step - 1
        # Anchored steps look back once after the warm-up, which costs one more call.
        fine = (budget - (total + config.anchored) * floor) / (1 - floor) - config.warmup
        done = round((spent - moment.step * floor) / (1 - floor) - config.warmup)
        scale = 1 if (fine + 0.5) * change >= done + 1 else cheapest
        after = budget - spent - costs[scale]
        if after > rest + SLACK:
            return 1
        if after < rest * floor - SLACK:
            return cheapest
        return scale

    def _check(self, total: int, floor: float) -> None:
        most = total / (self.config.warmup + (total - self.config.warmup + self.config.anchored) * floor)
        if self.config.speedup > most + 1e-9:
            warnings.warn(
                f"a speedup of {self.config.speedup:g} can't be reached with {total} steps, of which "
                f"{self.config.warmup} are warm-up: the most is {most:.2f}; take fewer steps instead, or gain 0",
                stacklevel=2,
            )
