"""How much each way to take a step errs: what a plan over patches and skipping weighs (`ddit.skip.joint`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ErrorProfile:
    """Errors of a model's velocity at some noise levels: root mean square over the numbers of the latents.

    Raises:
        ValueError: Where lists are not of one length, or noise levels don't rise.
    """

    sigmas: tuple[float, ...]
    """Noise levels, rising."""
    coarse: Mapping[int, tuple[float, ...]]
    """Scale -> error of a coarse step that stands alone, without an adapter."""
    bend: tuple[float, ...]
    """Error of a forecast at a distance of 1 in lambda from the last called step; it grows with its square."""

    def __post_init__(self) -> None:
        coarse = {int(s): tuple(map(float, v)) for s, v in self.coarse.items()}
        for name, value in (("sigmas", self.sigmas), ("bend", self.bend)):
            object.__setattr__(self, name, tuple(map(float, value)))
        object.__setattr__(self, "coarse", coarse)
        lists = [self.bend, *coarse.values()]
        if not self.sigmas or any(len(values) != len(self.sigmas) for values in lists):
            raise ValueError("an error profile needs a number of each list for each of its noise levels")
        if list(self.sigmas) != sorted(set(self.sigmas)):
            raise ValueError("an error profile's noise levels must rise")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ErrorProfile:
        """The inverse of `dataclasses.asdict`, through JSON."""
        return cls(**values)

    def coarse_error(self, scale: int, sigma: float) -> float:
        """Of a step at a scale; infinite for one that nobody measured."""
        if scale == 1:
            return 0.0
        return interpolated(self.sigmas, self.coarse[scale], sigma) if scale in self.coarse else math.inf

    def learnt(self, coarse: Mapping[int, Mapping[float, float]]) -> ErrorProfile:
        """With an adapter's errors, scale -> noise level -> error, in place of those without one."""
        known = {}
        for scale, rows in coarse.items():
            known[scale] = tuple(error_at(rows, sigma) for sigma in self.sigmas)
        return replace(self, coarse={**self.coarse, **known})

    def bend_at(self, sigma: float) -> float:
        """See `bend`."""
        return interpolated(self.sigmas, self.bend, sigma)


def error_at(rows: Mapping[float, float], sigma: float) -> float:
    """Between measured ones, noise level -> error."""
    places, errors = (tuple(map(float, row)) for row in zip(*sorted(rows.items()), strict=True))
    return interpolated(places, errors, sigma)


def interpolated(places: tuple[float, ...], values: tuple[float, ...], at: float) -> float:
    """Between neighbours on a line; outside of all, the nearest value."""
    for (low, one), (high, two) in pairwise(zip(places, values, strict=True)):
        if at < high:
            return one + (two - one) * max(at - low, 0.0) / (high - low)
    return values[-1]
