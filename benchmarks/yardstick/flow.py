"""Flow matching at small sizes first, then at full size: what the image and the video model's training share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.yardstick.config import Settings
from benchmarks.yardstick.data import Drawn
from benchmarks.yardstick.fit import Deadline, Figures, Loss, Stage, constant, fit, noise_from, precision, trapezoid
from benchmarks.yardstick.muon import Muon


class Flow(nn.Module):
    """A transformer, and linear layers on half-way features that tell where objects are and which covers what.

    Outlines are a small part of the flow's loss beside detail that nobody can predict; with these aids they are
    learnt many times sooner. The layers are used in training only.

    Args:
        transformer: Whose velocity is learnt.
        blocks: Of the transformer, in order.
        read: Number of the block whose features are read.
        width: Of the features.
        told: Numbers told of what covers every token's area.
        placed: Objects of which every token is told where they are.
    """

    SIDE = 2
    """A token's area is told in so many parts a side."""
    FAR = 32.0
    """Pixels on a canvas of 128."""

    def __init__(
        self, transformer: Any, blocks: Sequence[nn.Module], read: int, width: int, told: int, placed: int
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.aid = nn.ModuleDict({"masks": nn.Linear(width, told), "places": nn.Linear(width, 3 * placed)})
        self.norm = nn.LayerNorm(width)
        self._features: Tensor | None = None
        self.blocks = list(blocks)  # no ModuleList, so that they are no second names of the same weights
        self._observed = read
        self.blocks[read].register_forward_hook(self._read)

    def _read(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._features = output[1] if isinstance(output, tuple) else output

    def compile_blocks(self) -> None:
        """Compile each block, anew for each size; the one that is read stays as it is, as its hook would break it."""
        torch._dynamo.config.recompile_limit = 32
        for i, block in enumerate(self.blocks):
            if i != self._observed:
                block.compile(dynamic=False)

    @abstractmethod
    def velocity(self, noisy: Tensor, sigma: Tensor, text: tuple[Tensor, ...], guidance: Tensor) -> Tensor:
        """Noisy latents, noise levels and guidance ``[B]``, vectors of prompts -> velocity."""

    @abstractmethod
    def targets(self, covers: Tensor, tokens: int) -> Tensor:
        """What covers what ``[B, K, 32, 32]`` in [0, 1] as what is told of each token, ``[B, tokens, told]``."""

    @abstractmethod
    def places(self, spots: Tensor, tokens: int) -> Tensor:
        """`Drawn.spots` as what is told of each token, ``[B, tokens, placed, 3]``: how far
        away (x, y) an object is, and its radius, in units of `FAR`; a radius of 0 is no object."""

    def seen_from(self, centres: Tensor, spots: Tensor) -> Tensor:
        """Spots ``[..., 3]`` (x, y, radius) as they are told to tokens around ``centres [..., 2]``."""
        away, radius = torch.broadcast_tensors(spots[..., :2] - centres, spots[..., 2:])
        return torch.cat([away, radius[..., :1]], -1) / self.FAR

    def aid_loss(self, covers: Tensor, spots: Tensor) -> tuple[Tensor, Tensor]:
        """Of the last call's features: cross-entropy with what covers what, and absolute distance to places."""
        features = self.forget()
        assert features is not None, "call velocity first"
        features, tokens = self.norm(features), features.shape[1]
        masks = self.aid["masks"](features).float()
        wanted = self.places(spots, tokens)
        there = (wanted[..., 2:] > 0).float()
        places = self.aid["places"](features).float().view(wanted.shape)
        off = (places - wanted).abs() * there
        covered = F.binary_cross_entropy_with_logits(masks, self.targets(covers, tokens))
        return covered, off.sum() / (3 * there.sum()).clamp(min=1)

    def forget(self) -> Tensor | None:
        """Give the last call's features away: they are part of a graph, and can't be copied."""
        features, self._features = self._features, None
        return features


def grid(side: int, device: torch.device) -> Tensor:
    """Centres of tokens ``[side * side, 2]`` (x, y) in pixels of a canvas of 128."""
    places = (torch.arange(side, device=device) + 0.5) * 128 / side
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    return torch.stack([columns, rows], -1).flatten(0, 1)


@dataclass
class Batch:
    """What a step sees."""

    x: Tensor
    """Latents"""
    noisy: Tensor
    eps: Tensor
    sigma: Tensor
    """``[B]``"""
    text: tuple[Tensor, ...]
    covers: Tensor
    spots: Tensor
    size: int
    """In pixels"""


@dataclass
class Source:
    """Latents at every size, what covers what, and prompts."""

    latents: Mapping[int, Tensor]
    """Size in pixels, rising -> ``[P, ...]``, float16"""
    masks: Tensor
    """``[P, K, 32, 32]`` uint8"""
    spots: Tensor
    """``[P, K, 3]`` float32"""
    vectors: tuple[Tensor, ...]
    """Each ``[P + 1, ...]``, of the prompts and, last, of the empty one"""
    settings: Settings
    device: str

    @classmethod
    def made(
        cls,
        latents: Mapping[int, np.ndarray],
        drawn: Drawn,
        vectors: tuple[Tensor, ...],
        settings: Settings,
        device: str,
    ) -> Source:
        """All on the device."""
        there = {size: torch.from_numpy(x).to(device) for size, x in latents.items()}
        masks, spots = (torch.from_numpy(x).to(device) for x in (drawn.masks, drawn.spots))
        return cls(there, masks, spots.float(), vectors, settings, device)

    def text(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Vectors of prompts by number; -1 is the empty one."""
        return tuple(vector[rows] for vector in self.vectors)

    def batch(self, rng: np.random.Generator, stage: int, drop: float) -> Batch:
        """Samples of one size of a stage at logit-normal noise levels (SD3, arXiv 2403.03206).

        Pooling by s divides the noise by s: the same picture is as visible at a logit higher by log(s).
        """
        settings, device = self.settings, self.device
        sizes, noise = settings.sizes[stage], settings.noise[stage]
        size = int(rng.choice(sizes, p=settings.mix[stage]))
        count = round(settings.batch[stage] * (max(sizes) / size) ** 2)
        generator = noise_from(rng, device)
        rows = torch.randint(len(self.masks), (count,), generator=generator, device=device)
        x, covers = self.latents[size][rows].float(), self.masks[rows].float() / 255
        eps = torch.randn(x.shape, generator=generator, device=device)
        mean = noise[0] + math.log(size / min(sizes))
        logit = mean + noise[1] * torch.randn(len(x), generator=generator, device=device)
        sigma = torch.sigmoid(logit)
        words = rows.where(torch.rand(count, generator=generator, device=device) >= drop, -1)
        noisy = torch.lerp(x, eps, sigma.reshape(-1, *[1] * (x.ndim - 1)))
        return Batch(x, noisy, eps, sigma, self.text(words), covers, self.spots[rows], size)


def train_flow(folder: Path, flow: Flow, source: Source, deadline: Deadline) -> None:
    """One stage for each size; the model is left with its averaged weights."""
    settings = source.settings
    for number, (sizes, steps, seconds) in enumerate(
        zip(settings.sizes, settings.steps, settings.seconds, strict=True)
    ):
        loss, schedule = matching(flow, source, number), trapezoid if number else constant
        length = steps, deadline.within(seconds)
        stage = flow_stage(folder, f"flow-{max(sizes)}", flow, loss, length, schedule, settings)
        flow.load_state_dict(fit(stage, deadline), strict=False)
    flow.forget()


def flow_stage(
    folder: Path,
    name: str,
    flow: Flow,
    loss: Loss,
    length: tuple[int, float | None],
    schedule: Callable[[int, float], float],
    settings: Settings,
    factor: float = 1.0,
) -> Stage:
    """A stage of the flow's training; ``length`` is in steps and seconds, ``factor`` one of the learning rate."""
    seed = 20 + sum(map(ord, name)) + 1000 * settings.seed
    optimizers = make_optimizers(flow, factor * settings.lr)
    path, (steps, seconds) = folder / f"{name}.pt", length
    return Stage(name, path, flow, optimizers, loss, steps, schedule, seed, settings.ema, seconds=seconds)


def make_optimizers(flow: Flow, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices but those of modulation, AdamW for all else, as Muon's authors advise."""
    named = flow.transformer.named_parameters()
    blocks = [p for name, p in named if "blocks." in name and "norm" not in name and p.ndim == 2]
    chosen = {id(p) for p in blocks}
    rest = [p for p in flow.parameters() if p.requires_grad and id(p) not in chosen]
    return [
        Muon(blocks, lr=lr),
        torch.optim.AdamW(rest, lr=lr / 2, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def matching(flow: Flow, source: Source, stage: int) -> Loss:
    """Flow matching of a stage with guidance 1: mean squared error to ``eps - x``."""
    settings = source.settings

    def loss(step: int, rng: np.random.Generator) -> tuple[Tensor, Figures]:
        batch = source.batch(rng, stage, settings.unconditional)
        with precision(source.device):
            output = flow.velocity(batch.noisy, batch.sigma, batch.text, torch.ones_like(batch.sigma))
            masks, places = flow.aid_loss(batch.covers, batch.spots)
        error = F.mse_loss(output.float(), batch.eps - batch.x)
        aids = {"masks": masks.detach(), "places": places.detach()}
        return error + settings.mask_weight * masks + settings.place_weight * places, {
            "flow": error.detach(),
            **aids,
            "size": batch.size,
        }

    return loss
