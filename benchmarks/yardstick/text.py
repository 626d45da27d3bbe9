"""The text encoders' training: both learn to parse prompts, and are frozen then.

Large models get such vectors from text they read elsewhere. Without them the flow does not find out which colour
belongs to which object.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.yardstick.components import TEXT_WIDTH, TextEncoders
from benchmarks.yardstick.config import ImageSettings
from benchmarks.yardstick.fit import Deadline, Figures, Stage, cosine, fit
from ddit.embedded.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOST,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    random_scene,
)

ATTRIBUTES: dict[str, tuple[str | None, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "size": (*SIZES, None),
}
LAYOUTS = (*PLACES, *RELATIONS, None)
CLASSES = sum(map(len, ATTRIBUTES.values()))


def train_text(folder: Path, settings: ImageSettings, device: str, deadline: Deadline) -> TextEncoders:
    """Each shape word's vector must tell its object's attributes and rank, the pooled vector must tell all."""
    torch.manual_seed(settings.seed + 1)
    encoders = TextEncoders().to(device)
    heads = {"noun": CLASSES + MOST + len(LAYOUTS), "whole": MOST * CLASSES + len(BACKGROUNDS) + len(LAYOUTS)}
    parts = {name: nn.Linear(TEXT_WIDTH, width) for name, width in heads.items()}
    model = nn.ModuleDict({"encoders": encoders, **parts}).to(device)

    def loss(step: int, rng: np.random.Generator) -> tuple[Tensor, Figures]:
        batch = [scene for scene in (random_scene(rng, told=0.4) for _ in range(160)) if scene.split == "train"]
        pooled, tokens = encoders(encoders.ids([scene.prompt for scene in batch]).to(device))
        return parse_loss(batch, model["noun"](tokens), model["whole"](pooled)), {}

    # T5 does not scale its attention scores: a distance's bias, or the order of words, must learn faster than they do.
    order = encoders.t5.get_parameter("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    groups = [{"params": [order], "lr": 2.5e-2}, {"params": [p for p in model.parameters() if p is not order]}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    fit(Stage("text encoders", folder / "text.pt", model, [optimizer], loss, settings.text_steps, cosine, 11), deadline)
    return encoders.requires_grad_(False).eval()


def parse_loss(batch: list[Scene], nouns: Tensor, whole: Tensor) -> Tensor:
    """Cross-entropy of all a prompt says, read off its shape words ``[B, T, K]`` and the pooled vector ``[B, L]``."""
    rows, columns, ranks, targets = [], [], [], []
    for b, scene in enumerate(batch):
        words = scene.prompt.split()
        for rank, thing in enumerate(scene.things):
            rows.append(b)
            columns.append(words.index(thing.shape))  # the shapes of a scene differ
            ranks.append(rank)
            targets.append([options.index(getattr(thing, name)) for name, options in ATTRIBUTES.items()])
    device = nouns.device
    at, rank, answers = torch.tensor(rows), torch.tensor(ranks), torch.tensor(targets, device=device)
    layout = torch.tensor([LAYOUTS.index(scene.layout) for scene in batch], device=device)
    ground = torch.tensor([BACKGROUNDS.index(scene.background) for scene in batch], device=device)
    noun = nouns[at, torch.tensor(columns)]
    things, grounds, layouts = whole.split([MOST * CLASSES, len(BACKGROUNDS), len(LAYOUTS)], dim=-1)
    listed = things.unflatten(-1, (MOST, CLASSES))[at, rank]
    widths = [len(options) for options in ATTRIBUTES.values()]
    losses = [F.cross_entropy(grounds, ground), F.cross_entropy(layouts, layout)]
    losses.append(F.cross_entropy(noun[:, CLASSES : CLASSES + MOST], rank.to(device)))
    losses.append(F.cross_entropy(noun[:, CLASSES + MOST :], layout[at.to(device)]))
    for logits in (noun[:, :CLASSES], listed):
        losses += [F.cross_entropy(part, answers[:, k]) for k, part in enumerate(logits.split(widths, dim=-1))]
    return torch.stack(losses).mean()
