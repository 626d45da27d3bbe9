"""Settings of a training run. No torch here: the command line reads this before anything heavy is imported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from ddit.config import Positions, Start
from ddit.util.kinds import fits, told

OptimizerName = Literal["prodigy", "adamw"]
Weighting = Literal["relative", "bounded", "none", "sigma_sqrt", "cosmap"]
Precision = Literal["no", "bf16"]
Dtype = Literal["float32", "bfloat16"]
"""Half precision would need its loss scaled: gradients vanish in it."""
LrSchedule = Literal["constant", "cosine", "linear"]

LIVE = (
    *("steps", "checkpoint_every", "keep", "validate_every", "pictures", "tracker", "out", "sample_batch"),
    *("prompts", "prompt_column", "images"),
)
"""Fields that may change when a run is resumed; what samples are made of is compared with the samples themselves."""
FROM_ONE = (
    *("sample_batch", "steps", "batch", "accumulation", "checkpoint_every", "keep", "validate_every"),
    *("validation", "count", "height", "width", "frames", "sample_steps"),
)
"""Fields that are whole numbers of at least 1, where they are given."""
FROM_ZERO = ("rank", "lr_warmup", "pictures", "seed")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how. Saved with the run as ``train.json``.

    Raises:
        ValueError: When a field is out of its range; the message gives the range.
    """

    out: str = "runs/adapter"
    """Folder of the run: samples, checkpoints, log, and the result in ``adapter``."""
    model: str = "embedded"
    """Base, frozen: folder or hub id of a diffusers pipeline."""
    prompts: str | None = None
    """A file (text with a prompt per line, .json, .jsonl, .csv, .tsv, .parquet), or ``dataset:OWNER/NAME`` on the hub
    (`ddit.pipelines.prompts`). Not needed once the samples are there."""
    prompt_column: str | None = None
    """Where prompts are in it; by default one of the usual names."""
    images: str | None = None
    """Folder of pictures to learn from in place of the base's own samples, each with a caption: in ``metadata.jsonl``
    (``file_name``, ``text``), or in a text file of the same name. They are noised."""
    samples: str | None = None
    """Folder of the samples; by default ``samples`` in ``out``. Runs may share one."""
    count: int | None = None
    """Number of prompts or pictures taken; by default all."""
    sample_steps: int | None = None
    """Denoising steps of a sample; by default the model's own."""
    sample_batch: int = 8
    """Samples drawn at once, and kept in one file."""
    height: int | None = None
    """Of a sample in pixels; by default the model's own."""
    width: int | None = None
    """Likewise."""
    frames: int | None = None
    """Of a clip; by default the model's own."""
    call: dict = field(default_factory=dict)
    """Further arguments of the pipeline's call, such as ``guidance_scale``."""

    adapter: str | None = None
    """Adapter to train on from: folder or hub id. Its scales, rank and parts must be the ones asked for."""
    scales: tuple[int, ...] = (2, 4)
    """Scales above 1 to train."""
    min_sigma: tuple[float, ...] | None = None
    """Lowest noise level that each of ``scales`` is trained at, in their order: where schedules use it, as training a
    size at all levels hurts it (PPFlow, arXiv 2506.23543). By default those of ``adapter``, or else 0.3 for 2, 0.6 for
    4, 0.9 for 8."""
    rank: int = 32
    """Rank of LoRA; 0 leaves it out."""
    start: Start = "noise-consistent"
    """What the adapter adds to: the training-free step, or the paper's initialisation (``bilinear``)."""
    positions: Positions | None = None
    """Positions of large patches; by default ``grid``, for ``bilinear`` the paper's ``interpolated``."""
    residual: bool = True
    """Whether there is a residual path."""
    size_vector: bool = True
    """Whether there is a patch-size vector."""

    steps: int = 2000
    """Optimiser steps."""
    batch: int = 4
    """Samples per process and backward pass."""
    accumulation: int = 1
    """Batches per optimiser step."""
    optimizer: OptimizerName = "prodigy"
    """The paper takes Prodigy for images and AdamW for video."""
    lr: float | None = None
    """By default the paper's: 1.0 for Prodigy, 1e-4 for AdamW."""
    weight_decay: float = 0.01
    """Of the optimizer."""
    lr_schedule: LrSchedule = "constant"
    """How the learning rate falls."""
    lr_warmup: int = 0
    """Steps over which the learning rate rises from zero."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.999
    """Decay of the average of the weights that is saved; 0 saves the last weights."""
    weighting: Weighting = "none"
    """Weight of a noise level in the loss. ``none`` is the paper's. ``relative``: sigma / (1 - sigma). ``bounded``: 1,
    and below sigma = .25 falling as sigma squared, since the velocity of what lies inside a large patch divides by
    sigma. The others are SD3's."""

    dtype: Dtype = "float32"
    """Of the frozen base."""
    mixed_precision: Precision = "no"
    """Autocast of accelerate."""
    gradient_checkpointing: bool = False
    """Less memory for activations, one more forward a step."""
    cpu: bool = False
    """Stay on the CPU even where there is a GPU."""

    checkpoint_every: int = 200
    """Steps from one checkpoint to the next."""
    keep: int = 2
    """Checkpoints kept."""
    validate_every: int = 500
    """Steps from one validation to the next."""
    validation: int = 8
    """Samples kept apart for validation, each with all its guidance passes."""
    pictures: int = 4
    """Pictures of the example grid at every validation; 0 draws none and frees the text encoders."""
    tracker: str | None = None
    """A tracker of accelerate, such as ``tensorboard``."""
    seed: int = 0
    """Of samples and of the training."""

    def __post_init__(self) -> None:
        self._check_kinds()
        for name in ("scales", "min_sigma"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        powers = all(s >= 2 and not s & (s - 1) for s in self.scales)
        if not self.scales or not powers or len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales are {self.scales}; they must be distinct powers of two above 1")
        lowest = self.min_sigma
        if lowest is not None and (len(lowest) != len(self.scales) or not all(0 <= x < 1 for x in lowest)):
            raise ValueError(
                f"min_sigma is {lowest}; it must have a number from 0 to below 1 for each of {self.scales}"
            )
        for low, names in ((1, FROM_ONE), (0, FROM_ZERO)):
            for name in names:
                if getattr(self, name) is not None:
                    _at_least(name, getattr(self, name), low)
        for name, high in (("ema", 1.0), ("weight_decay", math.inf), ("clip", math.inf)):
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a number from 0 to {high:g}")
        if self.images is not None and self.prompts is not None:
            raise ValueError("pictures bring prompts of their own; leave prompts (--prompts) or images (--images) out")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr!r}; it must be a number above 0")

    def _check_kinds(self) -> None:
        """Refuse values that are not of the kind of their field."""
        for name, hint in get_type_hints(type(self)).items():
            value: Any = getattr(self, name)
            # Numbers below zero or not whole are told of with what is allowed.
            if fits(value, hint) or (hint is int and not isinstance(value, str | list | tuple)):
                continue
            exponent = isinstance(value, str) and "e" in value.lower() and _is_number(value)
            advice = "; in YAML write a point before the exponent, as in 1.0e-4" if exponent else ""
            raise ValueError(f"{name} is {value!r}; it must be {told(hint)}{advice}")

    @property
    def learning_rate(self) -> float:
        return self.lr or {"prodigy": 1.0, "adamw": 1e-4}[self.optimizer]

    @property
    def lowest(self) -> dict[int, float]:
        """Scale -> lowest noise level that it is trained at."""
        usual = (min(0.3 * math.log2(scale), 0.9) for scale in self.scales)
        return dict(zip(self.scales, self.min_sigma or usual, strict=True))

    @property
    def adapter_settings(self) -> dict[str, Any]:
        """Arguments of `ddit.PatchAdapter.for_model`."""
        names = ("scales", "rank", "start", "positions", "residual", "size_vector")
        return {**{name: getattr(self, name) for name in names}, "min_sigma": self.lowest}

    @property
    def samples_folder(self) -> Path:
        """Where the samples lie."""
        return Path(self.samples) if self.samples else Path(self.out) / "samples"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values of all fields."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; unknown names are refused."""
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(map(str, set(values) - known))
        if unknown:
            raise ValueError(f"unknown training settings {unknown}; allowed are {sorted(known)}")
        return cls(**values)

    def differences(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Fields in which a resumed run may not differ, and do: name -> (here, there)."""
        mine, theirs = self.to_dict(), other.to_dict()
        return {k: (v, theirs[k]) for k, v in mine.items() if k not in LIVE and v != theirs[k]}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _at_least(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {low}")
