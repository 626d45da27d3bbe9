"""The one training loop of the embedded models' stages and their judges, with its optimizers and learning rates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ddit.files import replacing
from ddit.progress import progress


def make_optimizers(model: nn.ModuleDict, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else, as Muon's authors advise.

    Args:
        lr: Of Muon; AdamW has half of it.
    """
    blocks = {name: p for name, p in model["transformer"].named_parameters() if "blocks." in name and p.ndim == 2}
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in blocks.values())]
    return [
        torch.optim.Muon(blocks.values(), lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr / 2, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def warm_cosine(step: int, steps: int, warmup: int = 50) -> float:
    """Learning-rate factor: linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def trapezoid(step: int, steps: int, decay_from: float, warmup: int = 100) -> float:
    """Learning-rate factor: linear warm-up, constant, then linear to zero from ``decay_from`` on."""
    return min(1.0, (step + 1) / warmup, (steps - step) / ((1 - decay_from) * steps))


Loss = Callable[[np.random.Generator], tuple[Tensor, dict[str, float]]]
"""Loss of a step, and figures for the log; called with a generator of the step's own."""


def fit(
    checkpoint: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    loss: Loss,
    factor: Callable[[int, int], float] = warm_cosine,
    *,
    steps: int,
    seed: Sequence[int],
    ema: float = 0.0,
    every: int = 200,
    clip: float = 1.0,
) -> dict[str, Tensor]:
    """Train, and go on from the checkpoint where there is one.

    Args:
        checkpoint: Named for what is trained; beside it lies a log, a line of JSON per step.
        optimizers: With their highest learning rates.
        factor: Of these, from a step and the number of steps.
        ema: Decay of the average of the weights.
        every: Steps between checkpoints.
        clip: Largest norm of the gradient.

    Returns:
        The averaged weights that were trained, or the last ones where ``ema`` is 0.

    Raises:
        FloatingPointError: When the loss is no longer finite.
    """
    average = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    first = _restore(checkpoint, model, average, optimizers)
    model.train()
    log = checkpoint.with_suffix(".jsonl").open("a", buffering=1)
    with progress(checkpoint.stem, steps, done=first) as advance, log:
        for step in range(first, steps):
            # A generator per step: a resumed run draws what an uninterrupted one would have.
            value, figures = loss(np.random.default_rng([*seed, step]))
            figures = {"loss": round(value.item(), 5), **figures}
            if not math.isfinite(figures["loss"]):
                raise FloatingPointError(f"the loss is {figures['loss']} at step {step}; lower the learning rate")
            _descend(value, model, clip, zip(optimizers, (rate * factor(step, steps) for rate in rates), strict=True))
            for key, mean in average.items():
                mean.lerp_(model.get_parameter(key).detach(), 1 - min(ema, (1 + step) / (10 + step)))
            advance(**figures)
            log.write(json.dumps({"step": step, **figures}) + "\n")
            if (step + 1) % every == 0 or step + 1 == steps:
                _save(checkpoint, model, average, optimizers, step + 1)
    model.eval()
    return average


def _descend(
    loss: Tensor, model: nn.Module, clip: float, optimizers: Iterable[tuple[torch.optim.Optimizer, float]]
) -> None:
    """A step of each optimizer at its learning rate."""
    model.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer, rate in optimizers:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()


def _save(
    path: Path, model: nn.Module, average: dict[str, Tensor], optimizers: Sequence[torch.optim.Optimizer], step: int
) -> None:
    """Everything a training needs to go on; a kill at any moment leaves a checkpoint that loads."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    with replacing(path) as partial:
        torch.save({"model": model.state_dict(), "average": average, "optimizers": states, "step": step}, partial)


def _restore(
    path: Path, model: nn.Module, average: dict[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> int:
    """The inverse of `_save`; gives the number of steps done."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    for key, mean in average.items():
        mean.copy_(state["average"][key])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]
