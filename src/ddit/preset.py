"""`ddit.json`, a file in a model's folder: how to call the model, and what was measured on its own samples."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ddit.config import FixedSchedule, Patches, PatchSchedule, PlannedSchedule
from ddit.profile import ErrorProfile
from ddit.util.files import write_json

FILE = "ddit.json"
VERSION = 5
SHIPPED = Path(__file__).parent / "presets"
"""Presets that go by a name: ``paper`` has the values of arXiv 2602.16968, section 4, for FLUX.1-dev and Wan 2.1."""


@dataclass(frozen=True, kw_only=True)
class QualityCurve:
    """What expected errors came out as in a model's runs, measured by `ddit calibrate`.

    Raises:
        ValueError: Where lists are not of one length, or errors don't rise.
    """

    errors: tuple[float, ...]
    """Expected (`ddit.skip.joint.expected_error`), rising."""
    psnr: tuple[float, ...]
    """Likeness to the plain run in dB, median over prompts, for each."""
    adapter: str = ""
    """`ddit.pretrained.fingerprint` of the adapter that was in use, if one was."""

    def __post_init__(self) -> None:
        for name in ("errors", "psnr"):
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
        if not len(self.errors) == len(self.psnr) > 1:
            raise ValueError("a quality curve needs as many psnr as errors, two at least")
        if list(self.errors) != sorted(set(self.errors)) or self.errors[0] <= 0:
            raise ValueError("a quality curve's errors must rise from above 0")
        if not isinstance(self.adapter, str):
            raise ValueError(f"a quality curve's adapter is {self.adapter!r}; it must be its fingerprint, or empty")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QualityCurve:
        """The inverse of `dataclasses.asdict`."""
        return cls(**values)

    def error_of(self, psnr: float) -> float:
        """The largest error whose pictures are expected to be as near to plain's as ``psnr`` dB.

        Outside of what was measured ten times the error is taken to cost 10 dB.
        """
        import numpy as np  # here, so that the command line answers at once

        largest = dict(zip(np.minimum.accumulate(self.psnr).tolist(), self.errors, strict=True))
        likeness, errors = zip(*sorted(largest.items()), strict=True)
        nearest = min(max(psnr, likeness[0]), likeness[-1])
        inside = np.exp(np.interp(nearest, likeness, np.log(errors)))
        return float(inside * 10 ** ((nearest - psnr) / 10))


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a model's folder says to ddit."""

    call: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for the pipeline's call, such as ``height`` or ``max_sequence_length``."""
    patches: Patches = PatchSchedule()  # noqa: RUF009 (frozen)
    """Schedule of patches that suits the model."""
    adapter: str = ""
    """Folder or hub id of the adapter that the command line uses unless it is told another, or ``none``."""
    detail_variance: Mapping[int, list[float]] = field(default_factory=dict)
    """Scale -> variance per latent channel of what pooling by the scale loses (see `ddit.patches.detail`)."""

    teacache: tuple[float, ...] | list[float] = ()
    """Coefficients of TeaCache's polynomial, highest power first (see `ddit.eval.calibrate`)."""

    quality: QualityCurve | None = None
    """What the errors that the profile tells make of the model's pictures."""

    profile: ErrorProfile | None = None
    """How much each way to take a step errs: a speedup is planned over patches and skipping with it."""

    costs: Mapping[int, float] = field(default_factory=dict)
    """Scale -> work of a step in full steps, where a plan shall reckon with other costs than this model's own: those of
    a large model, when a small one stands for it."""

    origin: str = ""
    """Where the values come from, if not from `ddit calibrate` on this model."""

    @classmethod
    def load(cls, folder: str | Path, *, required: bool = False) -> Preset:
        """Read a folder's preset; an empty one where there is no such file, unless it is ``required``.

        Where it is, one of `SHIPPED` may be named instead of a folder.

        Raises:
            ValueError: When the file is not a preset of this version, or is missing.
        """
        path = Path(folder) / FILE
        if required and not path.is_file():
            names = sorted(p.name for p in SHIPPED.iterdir())
            if str(folder) not in names:
                raise ValueError(
                    f"{folder} holds no {FILE}; name a folder that 'ddit calibrate' wrote one into, "
                    f"or {', '.join(names)}"
                )
            path = SHIPPED / str(folder) / FILE
        if not path.is_file():
            return cls()
        try:
            values = json.loads(path.read_text())
            version = values.pop("version")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a preset of ddit ({error!r}); write it anew or delete it") from error
        if version != VERSION:
            raise ValueError(f"{path} has version {version}, this ddit reads version {VERSION}; run 'ddit calibrate'")
        try:
            values["detail_variance"] = {int(s): list(v) for s, v in values["detail_variance"].items()}
            values["costs"] = {int(s): float(v) for s, v in values.get("costs", {}).items()}
            if "patches" in values:
                kinds = {"steps": FixedSchedule, "speedup": PlannedSchedule}
                kind = next((kinds[name] for name in kinds if name in values["patches"]), PatchSchedule)
                values["patches"] = kind.from_dict(values["patches"])
            for name, kind in (("quality", QualityCurve), ("profile", ErrorProfile)):
                if values.get(name) is not None:
                    values[name] = kind.from_dict(values[name])
            preset = cls(**values)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a preset of ddit ({error!r}); write it anew or delete it") from error
        return preset

    def save(self, folder: str | Path) -> None:
        """Write the preset into a folder."""
        write_json(Path(folder) / FILE, {"version": VERSION, **asdict(self)})


def for_batch(pipe: Any, settings: dict[str, Any], count: int) -> dict[str, Any]:
    """Arguments for a call with ``count`` prompts: pipelines want as many of all other texts, not one for all.

    Not even the default lyrics, which are none, serve more than one.
    """
    if "lyrics" in inspect.signature(type(pipe).__call__).parameters:
        settings = {"lyrics": "", **settings}
    names = ("negative_prompt", "prompt_", "lyrics")
    texts = {k: v for k, v in settings.items() if k.startswith(names) and isinstance(v, str)}
    return {**settings, **{k: [v] * count for k, v in texts.items()}}
