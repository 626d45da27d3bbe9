"""From a training run to the video model that ships: measure its preset, copy it into the package."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ddit.embedded.video import ADAPTER_FOLDER, MODEL_FOLDER
from ddit.embedded.video.clips import FRAMES, SIZE, clips
from ddit.embedded.video.components import TEXT_TOKENS
from ddit.patches import detail
from ddit.preset import Preset

CALL = {
    "height": SIZE,
    "width": SIZE,
    "num_frames": FRAMES,
    "num_inference_steps": 50,
    "guidance_scale": 1.0,
    "max_sequence_length": TEXT_TOKENS,
}
"""How the embedded video model wants to be called."""


def install(folder: Path, *, schedule: dict[str, Any] | None = None, to: Path = MODEL_FOLDER) -> Path:
    """Copy ``folder/model`` into the package, with a preset measured on its own samples.

    The adapter that ships is deleted: it was distilled from the model before.

    Args:
        folder: The run folder of `ddit.embedded.video.training.train`.
        schedule: Settings of the schedule to ship; by default those shipped before.

    Raises:
        ValueError: When there is no trained model.
    """
    from diffusers import WanPipeline

    if not (folder / "model" / "model_index.json").is_file():
        raise ValueError(f"{folder} holds no trained model; run 'ddit embedded train --video --folder {folder}' first")
    pipe = WanPipeline.from_pretrained(folder / "model", dtype=torch.float32)
    preset = Preset(
        call=CALL,
        schedule=Preset.load(to).schedule if schedule is None else schedule,
        detail_variance=measure_detail(pipe),
    )
    for before in (to, ADAPTER_FOLDER):
        shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(folder / "model", to)
    preset.save(to)
    return to


def measure_detail(pipe: Any, count: int = 16, scales: tuple[int, ...] = (2, 4)) -> dict[int, list[float]]:
    """Variance per latent channel of what pooling loses, on samples for prompts of the ``tune`` split."""
    prompts = [clip.prompt for clip in islice(clips(7, "tune"), count)]
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    latents = pipe(prompts, generator=generators, output_type="latent", return_dict=False, **CALL)[0]
    return {s: detail(latents, s).square().mean(dim=(0, 2, 3, 4)).tolist() for s in scales}
