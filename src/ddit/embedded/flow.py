"""Flow matching: the transformer's training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from einops import rearrange
from torch import Tensor, nn

from ddit.embedded import components
from ddit.embedded.config import CROP, RESOLUTIONS, TrainingConfig
from ddit.embedded.optim import fit, make_optimizers, trapezoid
from ddit.embedded.scenes import IMAGE_SIZE, PLACES, named_places
from ddit.embedded.text import TextEncoders


def train_flow(
    folder: Path,
    prompts: list[str],
    latents: dict[int, np.ndarray],
    masks: np.ndarray,
    encoders: TextEncoders,
    vae: AutoencoderKL,
    config: TrainingConfig,
    device: str,
) -> Path:
    """Flow matching on the latents, text encoders frozen as FLUX.1's are; resumes from ``flow.pt``."""
    torch.manual_seed(config.seed + 3)
    parts = {"transformer": components.make_transformer(), "text": encoders, "masks": MaskHead(192, things=2)}
    model = nn.ModuleDict(parts).to(device)
    model["text"].requires_grad_(False)
    if config.start_from:
        saved = FluxTransformer2DModel.from_pretrained(config.start_from, subfolder="transformer", dtype=torch.float32)
        model["transformer"].load_state_dict(saved.state_dict())
    ids, empty = encoders.ids(prompts), encoders.ids([""])
    around = placed(prompts)

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        size, place, pick = choose(around, config, rng)
        x, covers = torch.from_numpy(latents[size][pick].astype(np.float32)), torch.from_numpy(masks[pick]) / 255
        positions = grid_ids(math.isqrt(x.shape[1]))
        if place:
            x, covers, positions = crop(x, covers, positions, place, rng)
        words = unsaid(ids[pick], empty, config.unconditional, rng)
        # Pooling by s divides the noise by s: the same picture is as visible at a logit higher by log(s).
        mean = config.noise_mean + math.log(size / min(RESOLUTIONS))
        x, positions, words, covers = (part.to(device) for part in (x, positions, words, covers))
        with torch.autocast(device, torch.bfloat16, enabled=config.bf16):
            flow, aside = flow_loss(model, x, positions, words, covers, mean, config.noise_std, rng)
        figures = {"flow": round(flow.item(), 5), "masks": round(aside.item(), 5), "tokens": x.shape[1]}
        return flow + config.mask_weight * aside, figures

    average = fit(
        folder / "flow.pt",
        model,
        make_optimizers(model, config.lr),
        loss,
        partial(trapezoid, decay_from=config.decay_from),
        steps=config.flow_steps,
        seed=[config.seed, 4],
        ema=config.ema,
        every=config.checkpoint_every,
    )
    model.load_state_dict(average, strict=False)
    return export(folder / "model", model, vae)


def placed(prompts: Sequence[str]) -> dict[str | None, np.ndarray]:
    """Place -> numbers of the prompts that name it; ``None`` -> all."""
    named = [named_places(prompt) for prompt in prompts]
    places = sorted({*sum(named, ())})
    among = {place: np.array([i for i, n in enumerate(named) if place in n]) for place in places}
    return {None: np.arange(len(prompts)), **among}


def choose(
    around: dict[str | None, np.ndarray], config: TrainingConfig, rng: np.random.Generator
) -> tuple[int, str | None, np.ndarray]:
    """What a step sees: size of the pictures, place that they are cropped to, and their numbers."""
    size, place = int(rng.choice(RESOLUTIONS, p=config.mix)), None
    if size == max(RESOLUTIONS) and rng.random() < config.crops:
        place = str(rng.choice([name for name in around if name]))
    count = config.batches[size] * (3 if place else 1)
    return size, place, np.sort(rng.choice(around[place], size=count))


def unsaid(words: Tensor, empty: Tensor, chance: float, rng: np.random.Generator) -> Tensor:
    """Prompts ``[B, ...]``, some of them replaced by the empty one ``[1, ...]``, for guidance."""
    gone = torch.from_numpy(rng.random(len(words)) < chance)
    return torch.where(gone.reshape(-1, *[1] * (words.ndim - 1)), empty, words)


def crop(
    x: Tensor, covers: Tensor, positions: Tensor, place: str, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """`CROP` x `CROP` tokens around a place (Patch Diffusion, arXiv 2304.12526).

    A third of the cost, and most of what a prompt decides. Where crops lie depends on the prompt alone, so the velocity
    learnt is still the mean given it.

    Args:
        x: Tokens ``[B, N, C]`` of a square grid.
        covers: Masks ``[B, 2, H, H]`` of the same pictures.
        positions: ``[N, 3]``
        place: A key of `PLACES`.
        rng: Shifts the crop by a token at most.
    """
    side = math.isqrt(x.shape[1])
    fine = covers.shape[-1] // side
    across, down = (
        int(np.clip(round(centre / IMAGE_SIZE * side) - CROP // 2 + rng.integers(-1, 2), 0, side - CROP))
        for centre in PLACES[place][1]
    )
    rows, columns = slice(down, down + CROP), slice(across, across + CROP)
    grid = rearrange(x, "b (h w) c -> b h w c", h=side)[:, rows, columns]
    where = rearrange(positions, "(h w) c -> h w c", h=side)[rows, columns]
    covers = covers[..., fine * down : fine * (down + CROP), fine * across : fine * (across + CROP)]
    return rearrange(grid, "b h w c -> b (h w) c"), covers, rearrange(where, "h w c -> (h w) c")


class MaskHead(nn.Module):
    """Which of some things covers each sixteenth of a token's area, read off the features of one block.

    Outlines are a small part of the flow's loss beside grain that nobody can predict; without this aid shapes were
    still unlearnt after 7,000 steps.

    Args:
        width: Of the features.
        things: How many there may be.
    """

    SIDE = 4
    """A token's area is told in as many rows and columns."""

    def __init__(self, width: int, things: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, things * self.SIDE**2)

    def forward(self, features: Tensor, covers: Tensor) -> Tensor:
        """Cross-entropy of features ``[B, F side side, width]`` with masks ``[B, things, F, H, W]``."""
        frames = covers.shape[2]
        side = math.isqrt(features.shape[1] // frames)
        target = F.adaptive_avg_pool3d(covers, (frames, side * self.SIDE, side * self.SIDE))
        target = rearrange(target, "b k f (h y) (w x) -> b (f h w) (k y x)", y=self.SIDE, x=self.SIDE)
        return F.binary_cross_entropy_with_logits(self.logits(self.norm(features)), target)


BLOCK = 1
"""Single block whose features the head reads: the fourth of six."""


def flow_loss(
    model: nn.ModuleDict,
    x: Tensor,
    positions: Tensor,
    words: Tensor,
    covers: Tensor,
    mean: float,
    std: float,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Mean squared error to the velocity ``eps - x`` at logit-normal noise levels (SD3), and the masks' loss."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    eps = torch.randn(x.shape, generator=generator).to(x.device)
    sigma = torch.sigmoid(mean + std * torch.randn(len(x), generator=generator)).to(x.device)
    noisy = torch.lerp(x, eps, sigma[:, None, None])
    pooled, tokens = model["text"](words)
    transformer: Any = model["transformer"]
    features: list[Tensor] = []
    block = transformer.single_transformer_blocks[BLOCK]
    hook = block.register_forward_hook(lambda _, __, output: features.append(output[1]))
    output = transformer(
        hidden_states=noisy,
        timestep=sigma,
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        img_ids=positions,
        txt_ids=torch.zeros(words.shape[1], 3, device=x.device),
        return_dict=False,
    )[0]
    hook.remove()
    return F.mse_loss(output, eps - x), model["masks"](features[0], covers[:, :, None])


def grid_ids(side: int) -> Tensor:
    """``[side * side, 3]`` positions (0, row, column), as `FluxPipeline` makes them."""
    ids = torch.zeros(side, side, 3)
    ids[..., 1] = torch.arange(side)[:, None]
    ids[..., 2] = torch.arange(side)[None, :]
    return ids.reshape(-1, 3)


def export(folder: Path, model: nn.ModuleDict, vae: AutoencoderKL) -> Path:
    """Save a `FluxPipeline` in float16."""
    text: Any = model["text"]
    transformer: Any = model["transformer"]
    pipe = FluxPipeline(
        scheduler=components.make_scheduler(),
        vae=vae,
        text_encoder=text.clip,
        tokenizer=text.tokenizer,
        text_encoder_2=text.t5,
        tokenizer_2=text.tokenizer,
        transformer=transformer,
    )
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    return folder
