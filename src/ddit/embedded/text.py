"""The text encoders and the stage that teaches them to parse prompts."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from ddit.embedded import components
from ddit.embedded.config import TrainingConfig
from ddit.embedded.optim import fit
from ddit.embedded.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, TEXTURES, Scene, scenes


class TextEncoders(nn.Module):
    """CLIP and T5 under one roof, called as `FluxPipeline.encode_prompt` calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = components.make_tokenizer()
        self.clip, self.t5 = components.make_text_encoders()

    def ids(self, prompts: list[str]) -> Tensor:
        return self.tokenizer(
            prompts,
            padding="max_length",
            max_length=components.TEXT_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids ``[B, T]`` -> pooled ``[B, 128]``, tokens ``[B, T, 128]``."""
        return self.clip(ids).pooler_output, self.t5(ids)[0]


def load_text(folder: str) -> TextEncoders:
    """Those of a finished pipeline."""
    encoders = TextEncoders()
    clip: Any = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
    t5: Any = T5EncoderModel.from_pretrained(folder, subfolder="text_encoder_2", dtype=torch.float32)
    encoders.clip.load_state_dict(clip.state_dict())
    encoders.t5.load_state_dict(t5.state_dict())
    return encoders


ATTRIBUTES: dict[str, tuple[str | None, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": (*SIZES, None),
    "texture": (*TEXTURES, None),
    "place": (*PLACES, None),
}


def pretrain_text(path: Path, config: TrainingConfig, device: str) -> TextEncoders:
    """Teach both encoders to parse: each noun's vector tells its object's attributes, the pooled vector tells all.

    Large models get such vectors from text they read elsewhere. Without them the flow does not find out which colour
    belongs to which object.
    """
    torch.manual_seed(config.seed + 1)
    encoders = TextEncoders()
    classes = sum(map(len, ATTRIBUTES.values()))
    noun, whole = nn.Linear(128, classes), nn.Linear(128, 2 * classes + len(BACKGROUNDS))
    modules = nn.ModuleList([encoders, noun, whole]).to(device)
    # T5 does not scale its attention scores: a distance's bias, or the order of words, must learn faster than they do.
    order = encoders.t5.get_parameter("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    rest = [p for p in modules.parameters() if p is not order]
    rates = ((order,), 2.5e-2), (rest, 1e-3)
    optimizers = [torch.optim.AdamW(group, lr=lr, betas=(0.9, 0.95)) for group, lr in rates]

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = list(islice(scenes(int(rng.integers(2**31)), "train"), 128))
        pooled, tokens = encoders(encoders.ids([s.prompt for s in batch]).to(device))
        return parse_loss(batch, noun(tokens), whole(pooled)), {}

    fit(path, modules, optimizers, loss, steps=config.text_steps, seed=[config.seed, 3], clip=math.inf)
    return encoders


def parse_loss(batch: list[Scene], nouns: Tensor, whole: Tensor) -> Tensor:
    """Cross-entropy of every attribute, read off each noun's logits ``[B, T, K]`` and the pooled ones ``[B, 2K+4]``."""
    rows, columns, targets, pooled = [], [], [], []
    width = nouns.shape[-1]
    for b, scene in enumerate(batch):
        words = scene.prompt.split()
        start = 0
        for i, thing in enumerate(scene.things):
            start = words.index(thing.shape, start) + 1
            rows.append(b)
            columns.append(start - 1)
            pooled.append(whole[b, i * width : (i + 1) * width])
            targets.append([options.index(getattr(thing, name)) for name, options in ATTRIBUTES.items()])
    logits = torch.cat([nouns[rows, columns], torch.stack(pooled)])
    answers = torch.tensor(targets * 2, device=logits.device)
    losses = [
        F.cross_entropy(part, answers[:, k])
        for k, part in enumerate(logits.split([len(o) for o in ATTRIBUTES.values()], dim=-1))
    ]
    ground = torch.tensor([BACKGROUNDS.index(s.background) for s in batch], device=logits.device)
    return torch.stack(losses).mean() + F.cross_entropy(whole[:, 2 * width :], ground)
