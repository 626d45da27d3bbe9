"""`ddit.json`, a file in a model's folder: how to call the model, and what was measured on its own samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ddit.dial import Dial

FILE = "ddit.json"
VERSION = 2
SHIPPED = Path(__file__).parent / "presets"
"""Presets that go by a name: ``paper`` has the values of arXiv 2602.16968, section 4, for FLUX.1-dev and Wan 2.1."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a model's folder says to ddit."""

    call: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for the pipeline's call, such as ``height`` or ``max_sequence_length``."""
    schedule: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ddit.ScheduleConfig` that suit the model."""
    detail_variance: Mapping[int, list[float]] = field(default_factory=dict)
    """Scale -> variance per latent channel of what pooling by the scale loses (see `ddit.patches.detail`)."""

    teacache: tuple[float, ...] | list[float] = ()
    """Coefficients of TeaCache's polynomial, highest power first (see `ddit.eval.calibrate`)."""

    dial: Dial | None = None
    """What thresholds make of the model's runs (see `ddit.dial`)."""

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
            values["detail_variance"] = {int(s): list(v) for s, v in values["detail_variance"].items()}
            if values.get("dial") is not None:
                values["dial"] = Dial.from_dict(values["dial"])
            preset = cls(**values)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a preset of ddit ({error!r}); write it anew or delete it") from error
        if version != VERSION:
            raise ValueError(f"{path} has version {version}, this ddit reads version {VERSION}")
        return preset

    def save(self, folder: str | Path) -> None:
        """Write the preset into a folder."""
        (Path(folder) / FILE).write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n")


def for_batch(settings: dict[str, Any], count: int) -> dict[str, Any]:
    """Arguments for a call with ``count`` prompts: pipelines want as many negative prompts, not one for all."""
    negative = {k: [v] * count for k, v in settings.items() if k.startswith("negative_prompt") and isinstance(v, str)}
    return {**settings, **negative}
