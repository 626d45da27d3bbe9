"""Settings of a schedule. No torch here: the command line reads this before anything heavy is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

PolicyName = Literal["dynamic", "fixed", "first"]
Start = Literal["noise-consistent", "bilinear"]
Positions = Literal["grid", "interpolated"]
Difference = Literal["plain", "per-sigma"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """When to use large patches, and how a step with large patches is computed.

    The one dial is ``threshold``. The other defaults are the paper's, or were measured on the embedded model.

    Raises:
        ValueError: When a field is out of its range; the message gives the range.
    """

    policy: PolicyName = "dynamic"
    """``dynamic``: the paper's rule. ``fixed``: the list in ``steps``. ``first``: the first ``fraction`` of the
    steps at the largest of ``scales``, the rest at 1."""

    threshold: float = 4e-3
    """tau of the paper: a scale may be used while its statistic lies below. 0 keeps every step at scale 1. What it
    means depends on ``difference``; the paper's 0.001 is one of ``plain``."""
    speedup: float = 0.0
    """Asks for a speed instead of a threshold: how many times less work than a plain run of as many steps, from 1 on.
    0 leaves it to ``threshold``."""
    quality: float = 0.0
    """Asks for a quality instead of a threshold: likeness to the plain run, PSNR in dB, that is to be expected. Needs a
    preset of the model (``ddit calibrate``). 0 leaves it to ``threshold``."""
    percentile: float = 0.4
    """rho of the paper, in [0, 1]: which quantile of the patches' deviations is compared with ``threshold``."""
    order: int = 3
    """Order of the difference of the latents, 1 to 3. Order n needs n + 1 latents."""
    scales: tuple[int, ...] = (1, 2, 4)
    """Patch sizes to choose from, as multiples of the model's own. Powers of two, 1 among them."""
    warmup: int = None  # type: ignore[assignment]
    """Number of first steps that are not decided upon. By default 3, as in the paper; under a ``speedup`` 2, as many
    as a forecast needs. The rule needs ``order`` of them at least."""
    warmup_scale: int = 1
    """Scale of the warm-up steps."""
    difference: Difference = "per-sigma"
    """``plain``: of the latents from step to step, as in the paper. ``per-sigma``: what forecasts since the last step
    at scale 1 are expected to have made of the picture, if the step to be decided is one more of them. It is measured
    at each sample's last steps at scale 1, wherever they lie, so that neither the number of steps nor what large
    patches do to the path counts; it grows with each step until one at scale 1 measures it anew."""

    steps: tuple[int, ...] = ()
    """Scales of policy ``fixed``, one per step; the last one holds for further steps."""
    fraction: float = 0.5
    """Share of the steps policy ``first`` takes at the largest scale, in [0, 1]."""

    start: Start = "noise-consistent"
    """How a step with large patches is computed without an adapter: ``noise-consistent`` corrects the noise level of
    the pooled latents, ``bilinear`` is the paper's initialisation (FlexiViT's PI-resize)."""
    positions: Positions = "grid"
    """Positions of large patches: ``grid`` counts 0, 1, 2, ..., ``interpolated`` takes the patches' centres."""
    anchored: bool = True
    """Steps with large patches start from a forecast by the last steps at scale 1, which the coarse grid corrects.
    ``False`` is the paper's: each stands on its own."""
    gain: float = None  # type: ignore[assignment]
    """Share of that correction which is believed, in [0, 1]. 0 believes none, so that without an adapter the model is
    not even asked: ddit is then a cache that forecasts. By default 0 where ddit places the steps at scale 1 (policy
    ``dynamic``), since the work of asking pays for more of them, which bring more; 0.5 where the schedule is given.
    With an adapter what it has learnt is added instead."""

    def __post_init__(self) -> None:
        if self.warmup is None:
            object.__setattr__(self, "warmup", 2 if self.speedup else 3)
        if self.gain is None:
            object.__setattr__(self, "gain", 0.0 if self.policy == "dynamic" else 0.5)
        for name, options in (
            ("policy", PolicyName),
            ("start", Start),
            ("positions", Positions),
            ("difference", Difference),
        ):
            check_choice(name, getattr(self, name), options)
        for name in ("scales", "steps"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        object.__setattr__(self, "scales", tuple(sorted(self.scales)))
        _number("threshold", self.threshold, 0, math.inf)
        _number("speedup", self.speedup, 0, math.inf)
        _number("quality", self.quality, 0, math.inf)
        if 0 < self.speedup < 1:
            raise ValueError(f"speedup is {self.speedup:g}; it must be at least 1, or 0 to leave it to the threshold")
        if (self.speedup or self.quality) and self.policy != "dynamic":
            raise ValueError(
                f"policy {self.policy!r} has its own schedule; a speedup or a quality needs policy 'dynamic'"
            )
        if self.speedup and self.quality:
            raise ValueError("a speedup and a quality can't both be asked for; give one of them")
        _number("percentile", self.percentile, 0, 1)
        _number("fraction", self.fraction, 0, 1)
        _number("gain", self.gain, 0, 1)
        if not _is_integer(self.order) or self.order not in (1, 2, 3):
            raise ValueError(f"order is {self.order!r}; it must be 1, 2 or 3")
        if 1 not in self.scales or len(set(self.scales)) != len(self.scales):
            raise ValueError(f"scales are {self.scales}; they must be distinct and hold 1, the model's own patch size")
        for scale in (*self.scales, *self.steps):
            if scale < 1 or scale & (scale - 1):
                raise ValueError(f"{scale} is not a scale; scales are powers of two: 1, 2, 4, ...")
        if self.policy == "fixed" and not self.steps:
            raise ValueError("policy 'fixed' needs steps, a scale for each step, for example steps=(2, 2, 1)")
        unknown = sorted(set(self.steps) - set(self.scales))
        if unknown:
            raise ValueError(f"steps use {unknown}, which scales {self.scales} do not hold; add them to scales")
        if not _is_integer(self.warmup_scale) or self.warmup_scale not in self.scales:
            raise ValueError(f"warmup_scale is {self.warmup_scale!r}; it must be one of scales {self.scales}")
        if not isinstance(self.anchored, bool):
            raise ValueError(f"anchored is {self.anchored!r}; it must be True or False")
        if not _is_integer(self.warmup) or self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup!r}; it must be a whole number of at least 1")
        if not self.speedup and self.warmup < self.order:
            raise ValueError(
                f"warmup is {self.warmup!r}; order {self.order} needs {self.order + 1} latents, "
                f"so warmup must be a whole number of at least {self.order}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values of all fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ScheduleConfig:
        """The inverse of `to_dict`; unknown names are refused."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown schedule settings {unknown}; allowed are {sorted(known)}")
        return cls(**values)


def form_of_adapter(start: Start, anchored: bool | None, asks: bool | None) -> tuple[bool, bool]:
    """Whether an adapter's steps are anchored, and whether they ask the model, where ``None`` leaves it open.

    Raises:
        ValueError: For one that neither asks nor has anchors to forecast from.
    """
    anchored = start == "noise-consistent" if anchored is None else anchored
    asks = not anchored if asks is None else asks
    if not (asks or anchored):
        raise ValueError("an adapter that does not ask the model mends forecasts: it needs anchored=True")
    return anchored, asks


def check_choice(name: str, value: object, options: Any) -> None:
    """Refuse what the ``Literal`` does not hold."""
    allowed = get_args(options)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def _number(name: str, value: float, low: float, high: float) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if not ok or not math.isfinite(value) or not low <= value <= high:
        bound = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"finite and at least {low:g}"
        raise ValueError(f"{name} is {value!r}; it must be a number {bound}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    try:
        result = tuple(values)
    except TypeError:
        raise ValueError(f"{name} is {values!r}; it must be a list of whole numbers") from None
    if not all(map(_is_integer, result)):
        raise ValueError(f"{name} is {values!r}; it must be a list of whole numbers")
    return result
