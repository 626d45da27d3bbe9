"""From a training run to the model that ships: measure its preset, copy it into the package."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ddit.adapter import PatchAdapter
from ddit.embedded import ADAPTER_FOLDER, MODEL_FOLDER
from ddit.embedded.components import TEXT_TOKENS
from ddit.embedded.scenes import IMAGE_SIZE, scenes
from ddit.patches import detail
from ddit.preset import Preset, for_batch

CALL = {
    "height": IMAGE_SIZE,
    "width": IMAGE_SIZE,
    "num_inference_steps": 50,
    "guidance_scale": 0.0,
    "max_sequence_length": TEXT_TOKENS,
}
"""How the embedded model wants to be called."""


def install(folder: Path, *, schedule: dict[str, Any] | None = None) -> Path:
    """Copy ``folder/model`` into the package, with a preset measured on its own samples.

    The adapter that ships is deleted: it was distilled from the model before.

    Args:
        folder: The run folder of `ddit.embedded.training.train`.
        schedule: Settings of the schedule to ship; by default those shipped before.
    """
    from diffusers import FluxPipeline

    if not (folder / "model" / "model_index.json").is_file():
        raise ValueError(f"{folder} holds no trained model; run 'ddit embedded train --folder {folder}' first")
    pipe = FluxPipeline.from_pretrained(folder / "model", dtype=torch.float32)
    preset = Preset(
        call=CALL,
        schedule=Preset.load(MODEL_FOLDER).schedule if schedule is None else schedule,
        detail_variance=measure_detail(pipe),
    )
    for before in (MODEL_FOLDER, ADAPTER_FOLDER):
        shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(folder / "model", MODEL_FOLDER)
    preset.save(MODEL_FOLDER)
    return MODEL_FOLDER


def install_adapter(folder: Path) -> Path:
    """Copy an adapter into the package in float16.

    Args:
        folder: The run folder of `ddit.train.trainer.train`.

    Raises:
        ValueError: When there is no adapter, or it was made for another model.
    """
    from diffusers import FluxTransformer2DModel

    adapter: Any = PatchAdapter.from_pretrained(folder / "adapter")
    adapter.check(FluxTransformer2DModel.from_pretrained(MODEL_FOLDER, subfolder="transformer"))
    shutil.rmtree(ADAPTER_FOLDER, ignore_errors=True)
    adapter.half().save_pretrained(ADAPTER_FOLDER)
    return ADAPTER_FOLDER


def measure_detail(pipe: Any, count: int = 16, scales: tuple[int, ...] = (2, 4)) -> dict[int, list[float]]:
    """Variance per latent channel of what pooling loses, on samples for prompts of the ``tune`` split."""
    prompts = [scene.prompt for scene in islice(scenes(7, "tune"), count)]
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    tokens = pipe(prompts, generator=generators, output_type="latent", **for_batch(CALL, count)).images
    latents = pipe._unpack_latents(tokens, CALL["height"], CALL["width"], pipe.vae_scale_factor)
    return {s: detail(latents, s).square().mean(dim=(0, 2, 3)).tolist() for s in scales}
