"""A pipeline's own sampler, taken up again at any step of stored runs; gradients flow through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddit.train.samples import Samples


class Sampler:
    """The scheduler of a pipeline along the noise levels of some samples.

    Args:
        scheduler: Of diffusers, one that calls the model once a step, adds no noise of its own, and whose steps are
            linear in latents and velocities: Euler's, UniPC, DPM++.
        samples: Plain runs that it drew.

    Raises:
        ValueError: For another scheduler, and for runs that moved by no fixed mix of their guidance passes.
    """

    def __init__(self, scheduler: Any, samples: Samples) -> None:
        self.scheduler = scheduler
        self.samples = samples
        self.guidance = self._guidance()
        """Weight of each guidance pass in the velocity of the path ``[passes]``."""

    @property
    def looks_back(self) -> bool:
        """Whether a step depends on all before (multistep methods), which then have to be taken again."""
        return "solver_order" in self.scheduler.config

    def at(self, step: int) -> Any:
        """A scheduler that takes this step next, see `moved`; one that looks back has nothing to look at."""
        told = self.samples.manifest
        fresh = type(self.scheduler).from_config(self.scheduler.config)
        fresh.timesteps, fresh.sigmas = torch.tensor(told["timesteps"]), torch.tensor(told["levels"])
        fresh.num_inference_steps = len(told["timesteps"])
        fresh.set_begin_index(step)
        return fresh

    def taken_up(self, latents: Tensor, velocities: Tensor, step: int) -> Any:
        """A scheduler that takes this step next, after those of stored runs before.

        Args:
            latents, velocities: Of the path in these steps ``[B, step, C, ..., H, W]``; none for one that does not look
                back.
        """
        fresh = self.at(step - latents.shape[1])
        with torch.no_grad():
            retaken(fresh, latents, velocities)
        return fresh

    def mixed(self, velocities: Tensor) -> Tensor:
        """Velocity of the path, of all passes' ``[passes, ...]``."""
        return torch.einsum("p,p...->...", self.guidance.to(velocities), velocities)

    def _guidance(self) -> Tensor:
        """Read off the first run: by which mix of the passes' velocities the sampler gets to its latents."""
        samples = self.samples
        passes, steps = samples.passes, range(len(samples.sigmas))
        latents, velocities, _ = samples.load(range(passes), [steps] * passes)
        path = torch.cat([latents[:1], samples.clean(0)[None]], 1).double()
        try:
            # Steps are linear: without a velocity, then with each pass's.
            each = torch.cat([torch.zeros_like(velocities[:1]), velocities]).double().split(1)
            ends = torch.stack([torch.cat(retaken(self.at(0), path[:, :-1], velocity)) for velocity in each])
        except Exception as error:  # whatever a scheduler raises that wants to be called in another way
            raise ValueError(self._refusal(f"it can't be taken up again: {str(error).splitlines()[0]}")) from error
        target, basis = (path[0, 1:] - ends[0]).flatten(), (ends[1:] - ends[0]).flatten(1).T
        weights = torch.linalg.lstsq(basis, target[:, None]).solution[:, 0]
        off = float((basis @ weights - target).norm() / target.norm())
        if off > 0.01:
            raise ValueError(self._refusal(f"they move by no fixed mix of their guidance passes ({off:.0%} off)"))
        return weights.float()

    def _refusal(self, why: str) -> str:
        sampler = type(self.scheduler).__name__
        return (
            f"the runs in {self.samples.folder}, drawn by {sampler}, can't be drawn anew, which a corrector "
            f"needs: {why}; take another sampler for the pipeline, or train an adapter for large patches"
        )


def retaken(scheduler: Any, latents: Tensor, velocities: Tensor) -> list[Tensor]:
    """Where each of the scheduler's next steps leads ``[B, C, ..., H, W]``, from stored runs ``[B, steps, ...]``."""
    steps = zip(latents.unbind(1), velocities.unbind(1), strict=True)
    return [moved(scheduler, z, velocity) for z, velocity in steps]


def moved(scheduler: Any, z: Tensor, velocity: Tensor) -> Tensor:
    """Latents ``[B, C, ..., H, W]`` after the scheduler's next step."""
    index = scheduler.begin_index if scheduler.step_index is None else scheduler.step_index
    return scheduler.step(velocity, scheduler.timesteps[index], z, return_dict=False)[0]


def cut(scheduler: Any) -> None:
    """Detach what a multistep scheduler looks back on."""
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor):
            setattr(scheduler, name, value.detach())
        elif isinstance(value, list):
            setattr(scheduler, name, [v.detach() if isinstance(v, Tensor) else v for v in value])
