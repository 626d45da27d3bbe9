"""A transformer of a real architecture with random weights, and whole runs of it as a pipeline makes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from benchmarks.gpu.shapes import Shape
from ddit.eval.bench import Bench
from ddit.models.base import Architecture, Inputs, first


class Sampler:
    """The denoising loop of a pipeline without its text encoders and decoder: Euler's method, from noise to latents.

    It has a pipeline's ``transformer`` and ``scheduler``, so that `ddit.apply` takes it for one.
    """

    def __init__(self, architecture: Architecture, inputs: Inputs, shape: Shape) -> None:
        self.transformer: Any = architecture.transformer
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=shape.shift)
        self.name = architecture.batched[0]
        self.scale = 1000 / architecture.time_scale
        """FLUX is told the noise level, Wan the timestep."""
        text = inputs["encoder_hidden_states"]
        others = [{"encoder_hidden_states": torch.randn_like(text)} for _ in range(shape.guidance - 1)]
        self.calls = [{**inputs, **other, "return_dict": False} for other in ({}, *others)]

    @torch.no_grad()
    def __call__(self, steps: int) -> Tensor:
        """Latents as the transformer takes them, after a run of so many steps."""
        scheduler, given = self.scheduler, self.calls[0][self.name]
        sigmas: Any = np.linspace(1, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=sigmas, device=given.device)
        scheduler.set_begin_index(0)
        # Wan's pipeline keeps latents in float32, FLUX's in the model's type.
        z = given.float() if self.scale == 1 else given
        for index, t in enumerate(scheduler.timesteps):
            timestep = t.expand(len(z)) / self.scale
            told = {self.name: z.to(given.dtype), "timestep": timestep if self.scale == 1 else timestep.to(z.dtype)}
            answers = []
            for number, call in enumerate(self.calls):
                with self.transformer.cache_context(f"call {number}", step_index=index, num_inference_steps=steps):
                    answers.append(first(self.transformer(**{**call, **told})))
            velocity = answers[0] if len(answers) == 1 else torch.lerp(answers[1], answers[0], 5.0)
            z = scheduler.step(velocity, t, z, return_dict=False)[0]
        self.transformer._reset_stateful_cache()
        return z


class Loaded:
    """A model on the device, in one of two forms: ``eager`` and ``compiled``."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.device = shape, torch.device(device)
        bench = Bench(shape.model, dtype=shape.dtype, device=device, random_weights=True, rank=shape.rank)
        self.adapter = bench.adapter
        self.architecture = bench.architecture
        self.transformer = bench.transformer
        self.inputs = bench.inputs(shape.height, shape.width, shape.frames)
        self.sampler = Sampler(self.architecture, self.inputs, shape)
        self.form = "eager"

    def take(self, form: str) -> None:
        """Compile the repeated blocks, or run them as they are."""
        if form == self.form:
            return
        self.form = form
        for block in self.architecture.blocks():
            block._compiled_call_impl = None
        if form == "compiled":
            # Scales, adapters and caches each have graphs of their own; past the limit code runs uncompiled.
            torch._dynamo.config.recompile_limit = 64
            self.transformer.compile_repeated_blocks(**self.shape.compile)


def graphs() -> int:
    """Number of graphs that were compiled so far in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
