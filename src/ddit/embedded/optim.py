"""Optimizers, learning rates and checkpoints that the embedded model's stages and its judge share."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ddit.files import replacing


def make_optimizers(model: nn.ModuleDict) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else, as Muon's authors advise."""
    blocks = {name: p for name, p in model["transformer"].named_parameters() if "blocks." in name and p.ndim == 2}
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in blocks.values())]
    return [
        torch.optim.Muon(blocks.values(), weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def warm_cosine(step: int, steps: int, warmup: int = 50) -> float:
    """Learning-rate factor: linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def trapezoid(step: int, steps: int, decay_from: float, warmup: int = 100) -> float:
    """Learning-rate factor: linear warm-up, constant, then linear to zero from ``decay_from`` on."""
    return min(1.0, (step + 1) / warmup, (steps - step) / ((1 - decay_from) * steps))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def save_checkpoint(
    path: Path, model: nn.Module, average: dict[str, Tensor], optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    """Everything a training needs to go on; a kill at any moment leaves a checkpoint that loads."""
    state = {
        "model": model.state_dict(),
        "average": average,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
    }
    with replacing(path) as partial:
        torch.save(state, partial)
