"""What a user could do instead and no library offers: written against the pipeline, for comparison only."""

from __future__ import annotations

import time
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from ddit.generate import Run
from ddit.models import architecture_for


def progressive(
    pipe: Any, prompts: list[str], seeds: list[int], settings: dict[str, Any], fraction: float
) -> tuple[Run, tuple[float, float]]:
    """The first fraction of the steps on a picture half as high and wide, the rest on the whole one.

    Between the two the predicted clean latents are enlarged and given fresh noise at the level that the second half
    begins with, since enlarged noise would be none.

    Returns:
        The run, and its fractions of the tokens and of the FLOPs of a plain one.

    Raises:
        ValueError: For another pipeline than FLUX.1's, or a fraction that leaves either half without steps.
    """
    kind = type(pipe)
    if kind is not FluxPipeline:
        raise ValueError(f"method progressive is written for FluxPipeline, not {kind.__name__}")
    steps, height, width = (settings[k] for k in ("num_inference_steps", "height", "width"))
    early = round(fraction * steps)
    if not 2 <= early < steps:
        raise ValueError(f"method progressive: a fraction of {fraction} of {steps} steps leaves one half without steps")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    path: list[torch.Tensor] = []

    def watch(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        path.append(tensors["latents"].float())
        pipe._interrupt = step + 1 >= early
        return tensors

    started = time.perf_counter()
    small = {**settings, "height": height // 2, "width": width // 2}
    pipe(prompts, generator=generators, output_type="latent", callback_on_step_end=watch, return_dict=False, **small)
    sigmas = pipe.scheduler.sigmas
    clean = path[-1] - sigmas[early] * (path[-1] - path[-2]) / (sigmas[early] - sigmas[early - 1])
    clean = pipe._unpack_latents(clean, height // 2, width // 2, pipe.vae_scale_factor)
    clean = F.interpolate(clean, scale_factor=2, mode="bilinear")
    noise = torch.cat([torch.randn(1, *clean.shape[1:], generator=generator) for generator in generators])
    rest = np.linspace(1, 1 / steps, steps)[early:]
    level = _first_sigma(pipe, rest, clean.shape[-2] * clean.shape[-1] // 4)
    latents = pipe._pack_latents((1 - level) * clean + level * noise.to(clean), *clean.shape)
    pictures = pipe(
        prompts,
        latents=latents.to(pipe.transformer.dtype),
        output_type="np",
        return_dict=False,
        **{**settings, "sigmas": rest, "num_inference_steps": len(rest)},
    )[0]
    seconds = time.perf_counter() - started
    share = early / steps
    arch = architecture_for(pipe.transformer)
    text = settings.get("max_sequence_length", arch.text_tokens)
    rows, columns = clean.shape[-2:]
    whole, part = (arch.count_flops(arch.example(1, rows // s, columns // s, text)) for s in (1, 2))
    return Run(np.asarray(pictures), seconds, None), (1 - 0.75 * share, 1 - share + share * part / whole)


def _first_sigma(pipe: Any, raw: np.ndarray, tokens: int) -> float:
    """Noise level that the pipeline begins with when it is given ``raw`` levels."""
    scheduler = deepcopy(pipe.scheduler)
    c = scheduler.config
    mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    scheduler.set_timesteps(sigmas=raw, mu=mu)
    return float(scheduler.sigmas[0])
