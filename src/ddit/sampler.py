"""What a run needs to know of its sampler, read off a scheduler of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sampler:
    """The sampler of one run."""

    total: int | None = None
    """Number of steps, where known."""
    sigmas: Sequence[float] = ()
    """Noise levels of all steps; empty where nobody knows."""
    remembers: int = 1
    """Number of steps whose answers it makes a move of."""
    deterministic: bool = True
    """Whether it adds no noise; where it does, latents tell nothing of the next step."""

    @classmethod
    def of(cls, scheduler: Any, told: int | None = None) -> Sampler:
        """Of a scheduler where it is, ``None`` where there is none; see `run_of`."""
        return cls(*run_of(scheduler, told), remembered(scheduler), not adds_noise(scheduler))

    def end(self, step: int, levels: Sequence[float]) -> float:
        """Noise level where a step ends; where nobody knows, as far away as that of the step before.

        Args:
            step: Its number.
            levels: Noise levels of the last two steps, this one's last.
        """
        if self.sigmas:
            return next(iter(self.sigmas[step + 1 :]), 0.0)
        return max(2 * levels[-1] - levels[0], 0.0) if len(levels) > 1 else levels[-1]


def place(scheduler: Any) -> int | None:
    """Number of the step that a scheduler is at, or will begin with; ``None`` where nobody told it yet."""
    step = getattr(scheduler, "step_index", None)
    return step if step is not None else getattr(scheduler, "begin_index", None)


def run_of(scheduler: Any, told: int | None = None) -> tuple[int | None, list[float]]:
    """Number of steps of a scheduler's run from where it is, and their noise levels, if known.

    It need not be at its beginning: image to image begins later, and so does the second of two transformers.

    Args:
        told: The pipeline's own number of steps, for one that does not tell the scheduler where it begins (Wan V2V).
    """
    timesteps, sigmas = getattr(scheduler, "timesteps", None), getattr(scheduler, "sigmas", None)
    if timesteps is None:
        return None, []
    begin = place(scheduler)
    left = len(timesteps) - (begin or 0)
    total = min(left, told or left) if begin is None else left
    if total <= 0:  # the scheduler is at the end of another run
        return None, []
    if sigmas is None or len(sigmas) <= total:
        return total, []
    return total, torch.as_tensor(sigmas[:-1][-total:]).tolist()  # the last one is where the run ends


def remembered(scheduler: Any) -> int:
    """Of how many steps a sampler of diffusers takes the model's answers into its next move: 1 for Euler's method.

    A multistep sampler's order is how many it predicts from; UniPC corrects that by the answer it gets.
    """
    order = getattr(scheduler, "config", {}).get("solver_order", 1)
    return 1 if order == 1 else order + 1


def adds_noise(scheduler: Any) -> bool:
    """Whether a sampler of diffusers adds noise of its own in each step."""
    config = getattr(scheduler, "config", {})
    name = type(scheduler).__name__
    return bool(
        config.get("stochastic_sampling") or "sde" in str(config.get("algorithm_type", "")) or "LCM" in name
    ) or any(word in name for word in ("Ancestral", "SDE", "SASolver"))
