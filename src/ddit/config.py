"""Settings: small records, one per mechanism, so that no field can be idle. No torch here, so the CLI reads it at once.

`PatchSchedule` (the paper's rule), `FixedSchedule` (a list) or `PlannedSchedule` (for a speed) say which patches the
model sees; `SkipSchedule` says in which steps it is not called at all; `Coarse` says how a step with large patches is
computed without an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args

Start = Literal["noise-consistent", "bilinear"]
Positions = Literal["grid", "interpolated"]
Settings = TypeVar("Settings", bound="_Settings")


def check_choice(name: str, value: object, options: Any) -> None:
    """Refuse what the ``Literal`` does not hold."""
    allowed = get_args(options)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Refuse what is no number in ``[low, high]``."""
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if not ok or not math.isfinite(value) or not low <= value <= high:
        bound = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"finite and at least {low:g}"
        raise ValueError(f"{name} is {value!r}; it must be a number {bound}")


def is_integer(value: object) -> bool:
    """Whether a value is a whole number, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """A tuple of whole numbers, or an error that names it."""
    try:
        result = tuple(values)
    except TypeError:
        raise ValueError(f"{name} is {values!r}; it must be a list of whole numbers") from None
    if not all(map(is_integer, result)):
        raise ValueError(f"{name} is {values!r}; it must be a list of whole numbers")
    return result


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be True or False")


LARGEST = 16
"""Scale: grids are padded to large patches, so that more would only cost memory."""


def _settle(record: Any) -> None:
    """Lists become tuples and scales are checked; a nested record may come as a dictionary, from JSON."""
    if isinstance(record.coarse, dict):
        object.__setattr__(record, "coarse", Coarse.from_dict(record.coarse))
    if not isinstance(record.coarse, Coarse):
        raise ValueError(f"coarse is {record.coarse!r}; it must be a ddit.config.Coarse")
    name = "steps" if isinstance(record, FixedSchedule) else "scales"
    values = integers(name, getattr(record, name))
    for scale in values:
        if not 1 <= scale <= LARGEST or scale & (scale - 1):
            raise ValueError(f"{scale} is not a scale; scales are powers of two from 1 to {LARGEST}")
    if name == "scales":
        if len(set(values)) != len(values):
            raise ValueError(f"scales are {values}; they must be distinct")
        values = tuple(sorted(values))
    object.__setattr__(record, name, values)


class _Settings:
    """What all records share."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values of all fields."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
        """The inverse of `to_dict`; unknown names are refused."""
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown settings {unknown} of {cls.__name__}; allowed are {sorted(known)}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Coarse(_Settings):
    """How a step with large patches is computed without an adapter; an adapter brings its own.

    Raises:
        ValueError: For another word than those allowed.
    """

    start: Start = "noise-consistent"
    """``noise-consistent`` corrects the noise level of the pooled latents (docs/method.md); ``bilinear`` is the paper's
    initialisation (FlexiViT's PI-resize, arXiv 2212.08013)."""
    positions: Positions = "grid"
    """Positions of large patches: ``grid`` counts 0, 1, 2, ..., ``interpolated`` takes the patches' centres."""

    def __post_init__(self) -> None:
        check_choice("start", self.start, Start)
        check_choice("positions", self.positions, Positions)


PAPER = Coarse(start="bilinear", positions="interpolated")
"""Section 3.2 of the paper, before any training."""


@dataclass(frozen=True, kw_only=True)
class PatchSchedule(_Settings):
    """The paper's rule (arXiv 2602.16968, section 3.3): the largest patches in which the latents hardly bend.

    Raises:
        ValueError: When a field is out of its range; the message gives the range.
    """

    threshold: float = 1e-3
    """tau: a scale may be used while its statistic lies below. 0 keeps every step full."""
    percentile: float = 0.4
    """rho, in [0, 1]: which quantile of the patches' deviations is compared with ``threshold``."""
    order: int = 3
    """Order of the difference of the latents, 1 to 3. Order n needs n + 1 latents."""
    scales: tuple[int, ...] = (1, 2, 4)
    """Patch sizes to choose from, as multiples of the model's own. Powers of two, 1 among them."""
    warmup: int = 3
    """Number of full steps at the beginning; at least ``order``."""
    careful: bool = True
    """Whatever the rule says, use large patches only while what they drop lies below the noise
    (`ddit.schedule.below_noise`); with an adapter, only at the noise levels that it has learnt."""
    settle: bool = True
    """Keep a patch size until the difference spans steps of that size alone, as a switch bends the path by itself
    (`ddit.schedule.held_scale`)."""
    coarse: Coarse = Coarse()
    """How a coarse step is computed without an adapter."""

    def __post_init__(self) -> None:
        _settle(self)
        check_number("threshold", self.threshold, 0, math.inf)
        check_number("percentile", self.percentile, 0, 1)
        if not is_integer(self.order) or self.order not in (1, 2, 3):
            raise ValueError(f"order is {self.order!r}; it must be 1, 2 or 3")
        if 1 not in self.scales:
            raise ValueError(f"scales are {self.scales}; they must hold 1, the model's own patch size")
        if not is_integer(self.warmup) or self.warmup < self.order:
            raise ValueError(
                f"warmup is {self.warmup!r}; order {self.order} needs {self.order + 1} latents, "
                f"so warmup must be a whole number of at least {self.order}"
            )
        _check_flag("careful", self.careful)
        _check_flag("settle", self.settle)

    @classmethod
    def paper(cls, **changes: Any) -> PatchSchedule:
        """The paper to the letter: tau 0.001, rho 0.4, order 3, bilinear start, interpolated positions; no more."""
        return cls(**{"careful": False, "settle": False, "coarse": PAPER, **changes})


@dataclass(frozen=True, kw_only=True)
class FixedSchedule(_Settings):
    """A list of scales that does not look at the picture, as in PPFlow (arXiv 2506.23543).

    Raises:
        ValueError: For an empty list, or what is no scale.
    """

    steps: tuple[int, ...]
    """Scale of each step; the last one holds for further steps."""
    coarse: Coarse = Coarse()
    """How a coarse step is computed without an adapter."""

    def __post_init__(self) -> None:
        _settle(self)
        if not self.steps:
            raise ValueError("steps are empty; give a scale for each step, for example steps=(1, 1, 2, 2, 1)")

    @property
    def scales(self) -> tuple[int, ...]:
        """The scales that are used, and 1."""
        return tuple(sorted({1, *self.steps}))


@dataclass(frozen=True, kw_only=True)
class PlannedSchedule(_Settings):
    """Large patches in as many steps as a speedup takes, and in those where they change the pictures least: no
    threshold to tune (`ddit.planned`).

    Raises:
        ValueError: When a field is out of its range; the message gives the range.
    """

    speedup: float
    """How many times less work a run shall take than a plain one, from 1 on."""
    scales: tuple[int, ...] = (1, 2, 4)
    """As of `PatchSchedule`."""
    careful: bool = True
    """As of `PatchSchedule`."""
    coarse: Coarse = Coarse()
    """How a coarse step is computed without an adapter."""

    def __post_init__(self) -> None:
        _settle(self)
        check_number("speedup", self.speedup, 1, math.inf)
        if 1 not in self.scales:
            raise ValueError(f"scales are {self.scales}; they must hold 1, the model's own patch size")
        _check_flag("careful", self.careful)


Patches = PatchSchedule | FixedSchedule | PlannedSchedule

FULL = FixedSchedule(steps=(1,))
"""Every step full."""


@dataclass(frozen=True, kw_only=True)
class SkipSchedule(_Settings):
    """In which steps the model is not called: its answer is forecast from the last ones. Give one field.

    Raises:
        ValueError: When none or several are given, or one is out of its range.
    """

    threshold: float | None = None
    """Skip while the forecasts since the last call are expected to have changed the picture by less than this."""
    speedup: float | None = None
    """Call the model in so few steps that a run takes so many times less work than a plain one, from 1 on."""
    quality: float | None = None
    """Take so little work that runs stay as near to plain ones as this, PSNR in dB: a plan over patches and skipping,
    which needs a preset of the model (``ddit calibrate``)."""

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a skip schedule needs one of threshold, speedup and quality; given are {', '.join(given) or 'none'}"
            )
        name = given[0]
        check_number(name, getattr(self, name), 1 if name == "speedup" else 0, math.inf)
