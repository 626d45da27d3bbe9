"""The one training loop of all stages."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.yardstick.muon import multiplies_bfloat16
from ddit.util.files import replacing
from ddit.util.progress import progress

Figures = dict[str, Tensor | float]
Loss = Callable[[int, np.random.Generator], tuple[Tensor, Figures]]
"""Loss of a step, and figures for the log; called with the step's number and a generator of its own."""
LOG_EVERY = 10
"""Steps between two lines of the log; a loss is looked at as often, and before it is saved, as GPUs wait for it."""
SAVE_SECONDS = 120.0
"""Most seconds between two checkpoints, steps that take longer aside."""


class OutOfTime(Exception):
    """The time given has passed; a checkpoint was written, and the same call goes on from it."""


class Deadline:
    """A time budget in seconds shared by all stages; None has no end."""

    def __init__(self, seconds: float | None = None) -> None:
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self.end

    def within(self, seconds: float | None, spare: float = 5.0) -> float | None:
        """So many seconds, or fewer where fewer are left; ``spare`` is for what comes after."""
        return None if seconds is None else max(min(seconds, self.end - time.monotonic() - spare), 1.0)


@dataclass
class Stage:
    """What `fit` trains, and how."""

    name: str
    checkpoint: Path
    """Beside it lies a log, a line of JSON every `LOG_EVERY` steps."""
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    loss: Loss
    steps: int
    schedule: Callable[[int, float], float]
    """Factor of the learning rates at a step, given the share of the stage that is done."""
    seed: int
    ema: float = 0.0
    every: int = 1_000
    """Steps between checkpoints."""
    seconds: float | None = None
    """The stage ends after so long if its steps are not done by then, its learning rate having fallen in time."""

    def done(self, step: int, elapsed: float) -> float:
        """Share of the stage, 1 at its end."""
        return max(step / self.steps, elapsed / (self.seconds or math.inf))


def fit(stage: Stage, deadline: Deadline | None = None) -> dict[str, Tensor]:
    """Train, from the checkpoint on where there is one; every step draws from a generator of its own.

    Returns:
        The averages of the weights that are trained.

    Raises:
        OutOfTime: After a checkpoint was written.
        FloatingPointError: When the loss is no longer finite; the last checkpoint stays.
    """
    trained = {name: p for name, p in stage.model.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in trained.items()}
    first, before = _resume(stage, average)
    log = stage.checkpoint.with_suffix(".jsonl")
    _cut(log, first)
    stage.model.train()
    started = saved = time.monotonic()
    values: dict[str, float] = {}
    with progress(stage.name, stage.steps, done=first) as advance:
        step, share = first, stage.done(first, before)
        while share < 1:
            figures = _step(stage, step, share, trained, average)
            step, now = step + 1, time.monotonic()
            elapsed = before + now - started
            share = stage.done(step, elapsed)
            late = deadline is not None and deadline.passed
            save = late or share >= 1 or step % stage.every == 0 or now > saved + SAVE_SECONDS
            if save or step % LOG_EVERY == 0:
                values = _checked(stage, step, figures)
            advance(**values)
            if step % LOG_EVERY == 0:
                _log(log, {"step": step, **values, "steps_per_s": (step - first) / (now - started)})
            if save:
                _save(stage, average, step, elapsed)
                saved = time.monotonic()
            if late and share < 1:
                raise OutOfTime(f"{stage.name}: out of time after {step} of {stage.steps} steps")
    stage.model.eval()
    return average


def _step(stage: Stage, step: int, share: float, trained: dict[str, Any], average: dict[str, Tensor]) -> Figures:
    loss, figures = stage.loss(step, np.random.default_rng([stage.seed, step]))
    factor = stage.schedule(step, share)
    for optimizer in stage.optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
    for optimizer in stage.optimizers:
        for group in optimizer.param_groups:
            group.setdefault("full_lr", group["lr"])
            group["lr"] = factor * group["full_lr"]
        optimizer.step()
    decay = min(stage.ema, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in trained.values()], 1 - decay)
    return {"loss": loss.detach(), **figures}


def _checked(stage: Stage, done: int, figures: Figures) -> dict[str, float]:
    values = {name: round(float(value), 5) for name, value in figures.items()}
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(f"{stage.name}: the loss is {values['loss']} at step {done}; lower the learning rate")
    return values


def _resume(stage: Stage, average: dict[str, Tensor]) -> tuple[int, float]:
    """Load the checkpoint into the stage and the averages; returns the number of steps done, and their seconds."""
    if not stage.checkpoint.exists():
        return 0, 0.0
    device = next(stage.model.parameters()).device
    try:
        state = torch.load(stage.checkpoint, weights_only=True, map_location=device)
        stage.model.load_state_dict(state["model"])
    except Exception as error:
        raise ValueError(f"cannot go on from {stage.checkpoint}: {error}; delete it to start the stage anew") from error
    for optimizer, saved in zip(stage.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    average.update(state["average"])
    return state["step"], state.get("elapsed", 0.0)


def _save(stage: Stage, average: dict[str, Tensor], step: int, elapsed: float) -> None:
    state = {
        "model": stage.model.state_dict(),
        "average": average,
        "optimizers": [optimizer.state_dict() for optimizer in stage.optimizers],
        "step": step,
        "elapsed": elapsed,
    }
    with replacing(stage.checkpoint) as partial:
        torch.save(state, partial)


def _cut(log: Path, first: int) -> None:
    """Drop the lines of steps after the checkpoint, which are run again."""
    if log.exists():
        whole = [line for line in log.read_text().splitlines() if line.endswith("}")]
        log.write_text("".join(f"{line}\n" for line in whole if json.loads(line)["step"] <= first))


def _log(path: Path, figures: dict[str, float]) -> None:
    with path.open("a") as file:
        file.write(json.dumps({k: round(v, 5) for k, v in figures.items()}) + "\n")


def cosine(step: int, share: float, warmup: int = 50) -> float:
    """Linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * share))


def constant(step: int, share: float, warmup: int = 100) -> float:
    """Linear warm-up, then 1."""
    return min(1.0, (step + 1) / warmup)


def trapezoid(step: int, share: float, warmup: int = 100, decay_from: float = 0.7) -> float:
    """Linear warm-up, constant, then linear to zero."""
    return min(1.0, (step + 1) / warmup, (1 - share) / (1 - decay_from))


def precision(device: str) -> Any:
    """Autocast to bfloat16 where matrices are multiplied in it."""
    return torch.autocast(device, torch.bfloat16) if multiplies_bfloat16(device) else nullcontext()


def noise_from(rng: np.random.Generator, device: str) -> torch.Generator:
    """A generator on ``device`` that follows from the step's."""
    return torch.Generator(device).manual_seed(int(rng.integers(2**62)))
