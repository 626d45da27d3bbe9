"""Pictures of the user's to learn from, in place of the base's own: noised along the sampler's noise levels."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from torch import Tensor

from ddit.models import architecture_for
from ddit.models.base import Inputs
from ddit.pipelines.generate import pixels_per_latent


def check_encodes(pipe: Any) -> None:
    """Refuse a pipeline whose latents these pictures can't be turned into."""
    vae = getattr(pipe, "vae", None)
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(
            f"pictures are encoded by an AutoencoderKL, and this pipeline has {type(vae).__name__}; "
            "give prompts instead (--prompts), from which the base draws its own samples"
        )


@torch.no_grad()
def encoded(vae: AutoencoderKL, paths: Sequence[Path], height: int, width: int) -> Tensor:
    """Latents ``[N, C, H, W]`` as the transformer knows them, of pictures cut to a height and width in pixels.

    Raises:
        ValueError: For a file that is no picture.
    """
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as file:
                upright = ImageOps.exif_transpose(file).convert("RGB")
                fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # a damaged PNG is a SyntaxError
            raise ValueError(f"{path} can't be read as a picture ({error})") from error
        pictures.append(torch.from_numpy(np.array(fitted)).permute(2, 0, 1))
    x = torch.stack(pictures).to(vae.device, vae.dtype) / 127.5 - 1
    latents = vae.encode(x).latent_dist.mode()  # type: ignore[union-attr]
    return (latents - (vae.config["shift_factor"] or 0.0)) * vae.config["scaling_factor"]


@contextmanager
def noised(pipe: Any, calls: Sequence[tuple[Inputs, Tensor]], paths: Sequence[Path]) -> Iterator[None]:
    """Inside the block a run of the pipeline sees pictures: after every step they come with less of the same noise.

    The noise is the run's own, with which it begins. Where the run ends they are clean.

    Args:
        calls: The transformer's so far, which grow while the pipeline runs (`ddit.pipelines.generate.recorded`).
    """
    check_encodes(pipe)
    architecture, scheduler = architecture_for(pipe.transformer), pipe.scheduler
    step, told = scheduler.step, inspect.signature(scheduler.step)
    known: dict[str, Tensor] = {}

    def instead(*args: Any, **kwargs: Any) -> Any:
        sample = told.bind(*args, **kwargs).arguments["sample"]
        answer = step(*args, **kwargs)
        if not known:
            known.update(noise=sample, clean=_as_sample(sample))
        sigma = float(scheduler.sigmas[scheduler.step_index])  # of the step to come
        moved = torch.lerp(known["clean"].float(), known["noise"].float(), sigma).to(sample.dtype)
        if isinstance(answer, tuple):
            return (moved, *answer[1:])
        answer.prev_sample = moved
        return answer

    def _as_sample(sample: Tensor) -> Tensor:
        """The pictures in the form in which the sampler holds latents."""
        inputs = calls[-1][0]
        noisy = architecture.read(inputs)
        many, size = len(noisy.latents), noisy.latents.shape[2:]
        factor = pixels_per_latent(pipe)
        clean = encoded(pipe.vae, paths, *(factor * side for side in size)).to(noisy.latents)
        whole = architecture.renoised(inputs, clean.repeat(many // len(clean), 1, 1, 1), noisy.sigma)
        packed = whole[architecture.batched[0]][: len(sample)]
        if packed.shape != sample.shape:
            raise ValueError(f"{type(pipe).__name__} holds more than latents; give prompts instead (--prompts)")
        return packed

    scheduler.step = instead
    try:
        yield
    finally:
        del scheduler.step
