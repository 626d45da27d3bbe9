"""Optimizers, learning rates and checkpoints that the embedded model's stages and its judge share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ddit.files import replacing
from ddit.progress import progress


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


Loss = Callable[[int, np.random.Generator], tuple[Tensor, dict[str, float]]]
"""Loss of a step, and figures for the log; called with the step's number and a generator of its own."""


def fit(
    name: str,
    checkpoint: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    rates: Callable[[int], Sequence[float]],
    loss: Loss,
    *,
    steps: int,
    seed: int,
    ema: float = 0.0,
    every: int = 200,
    clip: float = 1.0,
) -> dict[str, Tensor]:
    """Train, and go on from the checkpoint where there is one.

    Args:
        name: Of the progress bar.
        checkpoint: Beside it lies a log, a line of JSON per step.
        rates: Learning rate of each optimizer at a step.
        ema: Decay of the average of the weights.
        every: Steps between checkpoints.
        clip: Largest norm of the gradient.

    Returns:
        The averaged weights that were trained, or the last ones where ``ema`` is 0.

    Raises:
        FloatingPointError: When the loss is no longer finite.
    """
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    average, first = {key: p.detach().clone() for key, p in trained.items()}, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average, first = state["average"], state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    model.train()
    with progress(name, steps, done=first) as advance, checkpoint.with_suffix(".jsonl").open("a") as log:
        for step in range(first, steps):
            # A generator per step: a resumed run draws what an uninterrupted one would have.
            value, figures = loss(step, np.random.default_rng([seed, step]))
            for optimizer, rate in zip(optimizers, rates(step), strict=True):
                set_lr(optimizer, rate)
                optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(list(trained.values()), clip)
            for optimizer in optimizers:
                optimizer.step()
            figures = {"loss": round(value.item(), 5), **figures}
            if not math.isfinite(figures["loss"]):
                raise FloatingPointError(f"the loss is {figures['loss']} at step {step}; lower the learning rate")
            decay = min(ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for key, mean in average.items():
                    mean.lerp_(trained[key], 1 - decay)
            advance(**figures)
            log.write(json.dumps({"step": step, **figures}) + "\n")
            log.flush()
            if (step + 1) % every == 0 or step + 1 == steps:
                save_checkpoint(checkpoint, model, average, optimizers, step + 1)
    model.eval()
    return average
