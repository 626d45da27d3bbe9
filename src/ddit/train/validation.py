"""How good an adapter is: errors on samples kept apart, and a grid of pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ddit.config import FixedSchedule
from ddit.pipelines import sounds
from ddit.pipelines.generate import Method
from ddit.pipelines.generate import run as generate
from ddit.pipelines.outputs import frames, save_png
from ddit.train.distill import Draw

if TYPE_CHECKING:
    from ddit.train.trainer import Run

SIGMAS = (0.95, 0.8, 0.6, 0.4, 0.2)
"""Noise levels that are validated, but those a scale does not learn: the steps that are nearest."""


@torch.no_grad()
def validate(run: Run) -> list[dict[str, Any]]:
    """Error per scale and noise level of the adapter, and of the training-free step on the same noise.

    With guidance in two passes also of what it makes of them (`ddit.train.distill.losses`).
    """
    rows = []
    samples = run.samples
    kept = range(run.runs, len(samples.prompts))
    for scale in run.config.scales:
        for place in places(samples.sigmas, run.config.lowest[scale]):
            found: dict[str, list[float]] = {}
            draws = [Draw(r, scale, place) for r in kept]
            for begin in range(0, len(draws), run.config.batch):
                part = draws[begin : begin + run.config.batch]
                batches = run.load(part)
                for name, adapter in (("error", run.adapter), ("training_free", None)):
                    own, guided = run.losses(batches, scale, list(range(len(part))), adapter)
                    found.setdefault(name, []).extend(own.tolist())
                    if samples.passes == 2:
                        found.setdefault(f"guided_{name}", []).extend(guided.tolist())
            means = {name: float(np.mean(values)) for name, values in found.items()}
            rows.append({"step": run.step, "scale": scale, "sigma": samples.sigmas[place], **means})
    return rows


def places(sigmas: Sequence[float], lowest: float) -> list[int]:
    """The steps of a run nearest to `SIGMAS`, among those from a noise level up."""
    learnt = [i for i, sigma in enumerate(sigmas) if sigma >= lowest]
    wanted = [sigma for sigma in SIGMAS if sigma >= lowest]
    return sorted({min(learnt, key=lambda i: abs(sigmas[i] - sigma)) for sigma in wanted if learnt})


def errors_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Of `validate`: scale -> [noise level, root mean square error], guided where it is, as an adapter keeps them."""
    errors: dict[str, list[list[float]]] = {}
    for row in rows:
        errors.setdefault(str(row["scale"]), []).append(
            [row["sigma"], math.sqrt(row.get("guided_error", row["error"]))]
        )
    return errors


def save_pictures(run: Run, path: Path) -> None:
    """PNG: plain above, below it each scale held for the first half of the steps.

    Of sound a WAV for each prompt, in which they follow each other.
    """
    count = min(run.config.pictures, run.config.validation)
    prompts = run.samples.prompts[-run.config.validation :][:count]
    settings = run.samples.manifest["settings"]
    seeds = list(range(count))
    bands = [generate(run.pipe, prompts, seeds, settings).pictures]
    half = len(run.samples.sigmas) // 2
    for scale in run.config.scales:
        method = Method(patches=FixedSchedule(steps=(*[scale] * half, 1)), adapter=run.adapter)
        with run.detached():
            drawn = generate(run.pipe, prompts, seeds, settings, method=method)
        bands.append(drawn.pictures)
    rate = sounds.sample_rate(run.pipe)
    if rate is not None:
        sounds.save(path.with_suffix(".wav"), np.concatenate(bands, axis=-1), rate=rate)
        return
    save_png(path, np.concatenate([np.concatenate(list(frames(band)), axis=1) for band in bands]))
