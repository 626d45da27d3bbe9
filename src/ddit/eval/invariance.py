"""Whether a speedup that is asked for holds whatever the number of steps, the size, the dtype and the sampler."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ddit.adapter import PatchAdapter
from ddit.config import ScheduleConfig
from ddit.eval.metrics import decibels
from ddit.generate import run
from ddit.preset import Preset
from ddit.progress import progress

SPEEDUPS = (1.25, 1.5, 2.0, 3.0, 4.0)
_FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SAMPLERS: dict[str, Callable[..., Any]] = {
    "Euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=3.0, **shift),
    "Heun": lambda _: FlowMatchHeunDiscreteScheduler(shift=3.0),
    "UniPC": lambda shift: UniPCMultistepScheduler(**_FLOW, flow_shift=3.0, **shift),
    "DPM++": lambda shift: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **_FLOW, flow_shift=3.0, **shift),
}
"""Those that diffusers has for flow matching; of what shifts their noise levels with the size of the picture."""


@dataclass(frozen=True)
class Setting:
    """What differs from the model's own settings."""

    name: str
    call: dict[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's call."""
    dtype: str | None = None
    sampler: str | None = None
    """One of `SAMPLERS`."""


def variations(height: int, width: int) -> list[Setting]:
    """The model's own settings, and others that differ in one thing.

    Args:
        height, width: The model's own.
    """
    sizes = [(height // 2, width // 2), (height, width // 2), (height * 3 // 2, width * 3 // 2)]
    return [
        Setting("its own"),
        *(Setting(f"{n} steps", {"num_inference_steps": n}) for n in (12, 25, 100)),
        *(Setting(f"{h} x {w}", {"height": h, "width": w}) for h, w in sizes),
        Setting("bfloat16", dtype="bfloat16"),
        *(Setting(f"{name}, 25 steps", {"num_inference_steps": 25}, sampler=name) for name in SAMPLERS),
    ]


def speedups_held(
    pipe: Any, preset: Preset, prompts: Sequence[str], settings: dict[str, Any], adapter: PatchAdapter | None = None
) -> list[dict[str, Any]]:
    """Every one of `SPEEDUPS` under each of `variations`.

    Returns:
        Rows with ``setting``, ``asked``, ``got`` (how many times less work than a plain run of as many steps),
        ``off`` (the latter by the former, less 1), ``steps`` (calls of the model in a plain run) and ``psnr`` to
        the plain run under the same settings; or with ``setting`` and ``refused``, where the pipeline does not take it.
    """
    rows: list[dict[str, Any]] = []
    chosen = variations(settings["height"], settings["width"])
    with progress("invariance", len(chosen)) as advance:
        for setting in chosen:
            rows += _held(pipe, preset, list(prompts), settings, setting, adapter)
            advance()
    return rows


def _held(
    pipe: Any,
    preset: Preset,
    prompts: list[str],
    settings: dict[str, Any],
    setting: Setting,
    adapter: PatchAdapter | None,
) -> list[dict[str, Any]]:
    """The rows of one of `variations`."""
    varied = copy.deepcopy(pipe).to(dtype=getattr(torch, setting.dtype)) if setting.dtype else copy.copy(pipe)
    if setting.sampler is not None:
        names = ("use_dynamic_shifting", "time_shift_type")
        own = pipe.scheduler.config
        varied.scheduler = SAMPLERS[setting.sampler]({name: own[name] for name in names if name in own})
    draw = partial(run, varied, prompts, list(range(len(prompts))), {**settings, **setting.call}, preset=preset)
    try:
        plain = draw().pictures
    except Exception as error:  # Whatever a pipeline raises at a sampler that it does not take.
        if setting.sampler is None:
            raise
        return [{"setting": setting.name, "refused": (str(error) or repr(error)).splitlines()[0]}]
    rows = []
    for asked in SPEEDUPS:
        outcome = draw(config=ScheduleConfig(speedup=asked), adapter=adapter)
        assert outcome.report is not None
        got = 1 / np.array(outcome.report.flops_fractions)
        rows.append(
            {
                "setting": setting.name,
                "asked": asked,
                "got": float(got.mean()),
                "off": float(np.abs(got / asked - 1).max()),
                "steps": len(outcome.report.steps),
                "psnr": float(np.median(decibels(outcome.pictures, plain))),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown: a line per setting, work saved and likeness for each speed."""
    lines = [
        "How many times less work than a plain run of as many steps, and PSNR to it in dB.",
        "",
        "| setting | calls | " + " | ".join(f"{s:g}x asked" for s in SPEEDUPS) + " |",
        "|---" * (2 + len(SPEEDUPS)) + "|",
    ]
    for name in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == name]
        if "refused" in own[0]:
            lines.append(f"| {name} | | " + "refused by the pipeline | " + "| " * (len(SPEEDUPS) - 1))
            continue
        cells = " | ".join(f"{row['got']:.2f}x, {row['psnr']:.1f}" for row in own)
        lines.append(f"| {name} | {own[0]['steps']} | {cells} |")
    return "\n".join(lines) + "\n"
