"""From a training run to the model that ships: measure its preset, copy it into the package."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ddit.embedded import CORRECTOR_FOLDER, MODEL_FOLDER
from ddit.embedded.components import TEXT_TOKENS
from ddit.embedded.scenes import IMAGE_SIZE, scenes
from ddit.patches import detail_variance
from ddit.preset import Preset, for_batch
from ddit.skip.corrector import ForecastCorrector

CALL = {
    "height": IMAGE_SIZE,
    "width": IMAGE_SIZE,
    "num_inference_steps": 50,
    "guidance_scale": 0.0,
    "max_sequence_length": TEXT_TOKENS,
}
"""How the embedded model wants to be called."""


def install(folder: Path) -> Path:
    """Ship the picture model of ``folder``, the run folder of `ddit.embedded.training.train`; see `ship`."""
    prompts = (scene.prompt for scene in scenes(7, "tune"))
    return ship(folder, MODEL_FOLDER, CORRECTOR_FOLDER, CALL, prompts)


def ship(folder: Path, to: Path, corrector: Path, call: dict[str, Any], prompts: Iterator[str]) -> Path:
    """Copy ``folder/model`` into the package, with a preset measured on its own samples.

    Args:
        corrector: Folder of the corrector that ships, which is deleted: it learnt from the model before.
        call: How the model wants to be called.
        prompts: Of the ``tune`` split.

    Raises:
        ValueError: When there is no trained model.
    """
    from diffusers import DiffusionPipeline

    if not (folder / "model" / "model_index.json").is_file():
        raise ValueError(f"{folder} holds no trained model; make one there with 'ddit embedded train'")
    pipe: Any = DiffusionPipeline.from_pretrained(folder / "model", dtype=torch.float32)
    preset = Preset(
        call=call,
        skip=Preset.load(to).skip,
        detail_variance=measure_detail(pipe, call, prompts),
    )
    for before in (to, corrector):
        shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(folder / "model", to)
    preset.save(to)
    return to


def install_corrector(folder: Path, *, model: Path = MODEL_FOLDER, to: Path = CORRECTOR_FOLDER) -> Path:
    """Copy a corrector into the package in float16.

    Args:
        folder: The run folder of `ddit.train.trainer.train`.
        model: The pipeline that it must have been made for.

    Raises:
        ValueError: When there is no corrector, or it was made for another model.
    """
    from diffusers import DiffusionPipeline

    corrector: Any = ForecastCorrector.from_pretrained(folder / "corrector")
    corrector.check(DiffusionPipeline.from_pretrained(model).transformer)
    shutil.rmtree(to, ignore_errors=True)
    corrector.half().save_pretrained(to)
    return to


def measure_detail(
    pipe: Any, call: dict[str, Any], prompts: Iterator[str], count: int = 16, scales: tuple[int, ...] = (2, 4)
) -> dict[int, list[float]]:
    """Variance per latent channel of what pooling loses, on samples."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    settings = {"output_type": "latent", "return_dict": False, **for_batch(pipe, call, count)}
    latents = pipe(list(islice(prompts, count)), generator=generators, **settings)[0]
    if latents.ndim == 3:
        latents = pipe._unpack_latents(latents, call["height"], call["width"], pipe.vae_scale_factor)
    return {s: detail_variance(latents, s, 1).tolist() for s in scales}
