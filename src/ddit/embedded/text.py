"""The text encoders and the stage that teaches them to parse prompts."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddit.embedded import components
from ddit.embedded.config import TrainingConfig
from ddit.embedded.optim import set_lr, warm_cosine
from ddit.embedded.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, TEXTURES, Scene, scenes
from ddit.progress import progress


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


ATTRIBUTES: dict[str, tuple[str | None, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": (*SIZES, None),
    "texture": (*TEXTURES, None),
    "place": (*PLACES, None),
}


def pretrain_text(path: Path, config: TrainingConfig, device: str) -> TextEncoders:
    """Teach both encoders to parse: each noun's vector tells its object's attributes, the pooled vector tells all.

    Large models get such vectors from text they read elsewhere. Without this stage the flow spends most of its
    training on finding out which colour belongs to which object.
    """
    torch.manual_seed(config.seed + 1)
    encoders = TextEncoders().to(device)
    if path.exists():
        encoders.load_state_dict(torch.load(path, weights_only=True))
        return encoders
    classes = sum(map(len, ATTRIBUTES.values()))
    noun, whole = (
        nn.Linear(128, classes).to(device),
        nn.Linear(128, 2 * classes + len(BACKGROUNDS)).to(device),
    )
    modules = nn.ModuleList([encoders, noun, whole])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-3, betas=(0.9, 0.95))
    source = scenes(config.seed + 2, "train")
    with progress("text encoders", config.text_steps) as advance:
        for step in range(config.text_steps):
            set_lr(optimizer, 2e-3 * warm_cosine(step, config.text_steps))
            batch = [next(source) for _ in range(128)]
            pooled, tokens = encoders(encoders.ids([s.prompt for s in batch]).to(device))
            loss = parse_loss(batch, noun(tokens), whole(pooled))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            advance(loss=loss.item())
    torch.save(encoders.state_dict(), path)
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
