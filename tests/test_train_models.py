"""Training on every architecture, on shrunken models in their own pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchLCMScheduler
from torch import nn

import tiny
import tiny_z_image
from ddit import PatchAdapter
from ddit.models import architecture_for
from ddit.models.base import first
from ddit.train import rollout
from ddit.train.distill import Draw, errors, make_batch
from ddit.train.sampler import Sampler
from ddit.train.samples import _seed, draw_samples
from test_architectures import CASES, SAMPLERS, SMALL, parameters
from test_corrector import corrector_for, skipping

ELSEWISE = ("wan-vace", "wan-animate", "skyreels-v2-forcing", "flux3")
"""Their pipelines draw one clip a call, or are modular, which no command calls."""
TRAINED = tuple(name for name in SMALL if name not in ELSEWISE)
"""Models whose pipelines draw several samples in one call, as training has them."""


class Told:
    """A pipeline that is told embeddings, called with prompts as one with text encoders."""

    def __init__(self, pipe, given: dict[str, Any]) -> None:
        self.pipe, self.given = pipe, given

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("pipe", "given"):
            super().__setattr__(name, value)
        else:
            setattr(self.pipe, name, value)

    def __call__(self, prompts: list[str], **settings) -> Any:
        return self.pipe(**self.given, **settings)


@parameters(TRAINED)
def test_an_adapter_learns_from_runs_of_its_base(name, tmp_path):
    """What `ddit train` does in a step: runs are drawn once, and every part gets a gradient from them."""
    case = CASES[name]
    pipe = case.make()
    told = Told(pipe, case.call)
    samples = draw_samples(tmp_path, told, {"num_inference_steps": 8}, [tiny.PROMPT], batch=1, shard=1, seed=0)
    assert samples.passes == case.passes * case.rows == len(samples) and len(samples.sigmas) == 8
    architecture = architecture_for(pipe.transformer)
    batch = make_batch(architecture, samples, [Draw(n, 2, 5) for n in range(len(samples))], "cpu", torch.float32)
    with torch.no_grad():
        answer = architecture.velocity(first(pipe.transformer(**batch.inputs)), batch.target.shape[2:])
    torch.testing.assert_close(answer, batch.target, rtol=1e-3, atol=1e-4)
    adapter = PatchAdapter.for_model(pipe.transformer.requires_grad_(False), rank=2)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.02)
    adapter.attach(pipe.transformer)
    rows = list(range(len(samples)))
    errors(pipe.transformer, architecture, adapter.coarse, adapter, {}, batch, 2, rows).sum().backward()
    for key, parameter in adapter.named_parameters():
        used = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert used == key.startswith("parts.2"), key


def test_records_are_those_of_their_runs_where_guidance_is_stacked(tmp_path):
    """However many runs are drawn together: one of each pass, beside the end of the same run."""
    found = []
    for batch in (1, 2):
        told = Told(tiny_z_image.pipeline(), {})
        told.pipe.encode_prompt = lambda prompt, **_: (
            tiny_z_image.embeds(1) * len(prompt),
            tiny_z_image.embeds(2) * len(prompt),
        )
        told.given = {"prompt": ["a"] * batch, "height": 32, "width": 32}
        settings = {"num_inference_steps": 3}
        samples = draw_samples(tmp_path / str(batch), told, settings, ["a"] * 4, batch=batch, shard=4, seed=0)
        assert samples.passes == 2 and len(samples) == 8
        loaded = [samples.load([i], [[0, 2]]) for i in range(8)]
        found.append([(latents, velocity, samples.clean(i)) for i, (latents, velocity, _) in enumerate(loaded)])
    for one, other in zip(*found, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    starts = {float(latents[0, 0].sum()) for latents, _, _ in found[0]}
    assert len(starts) == 4


ANEW = [
    # But of those whose passes are stacked in one call, or whose guidance keeps the norm of each row.
    *((name, None) for name in TRAINED if CASES[name].rows == 1 and name != "lumina2"),
    ("lumina2-without-guidance", None),
    *((name, sampler) for name in ("wan", "wan-without-guidance") for sampler in ("euler", "unipc", "dpm++")),
]
"""Names of cases, and samplers other than the pipeline's own."""


@pytest.mark.parametrize(
    ("name", "sampler", "learnt"),
    [*((*case, True) for case in ANEW), *((name, None, False) for name in ("flux", "wan"))],
)
def test_runs_drawn_anew_in_training_are_those_of_the_pipeline(name, sampler, learnt, tmp_path):
    """From the noise to the end, forecasts corrected or not; and gradients reach all of the corrector."""
    case = CASES[name]
    pipe = case.make()
    if sampler is not None:
        pipe.scheduler = SAMPLERS[sampler]()
    told = Told(pipe, case.call)
    samples = draw_samples(tmp_path, told, {"num_inference_steps": 8}, [tiny.PROMPT], batch=1, shard=1, seed=0)
    assert samples.passes == case.passes
    corrector = None
    pipe.transformer.requires_grad_(False)
    if learnt:
        corrector = corrector_for(pipe.transformer, seed=1, size=0.05)
        corrector.attach(pipe.transformer)
    called = rollout.plan(2.0, samples.sigmas)
    runs = rollout.Runs(Sampler(pipe.scheduler, samples), [0], torch.device("cpu"), torch.float32)
    architecture = architecture_for(pipe.transformer)

    def errors_of(course):
        return rollout.errors(pipe.transformer, architecture, corrector, runs, course)

    *_, error = errors_of(rollout.Course(called, range(len(called))))
    with skipping(pipe, [int(i in called) for i in range(8)], corrector=corrector) as run:
        generators = [torch.Generator().manual_seed(_seed(0, 0))]
        latents = told([tiny.PROMPT], generator=generators, output_type="latent", num_inference_steps=8)[0]
    assert run.report.scales == [[int(i in called) for i in range(8)]]
    clean = latents if latents.ndim > 3 else architecture.velocity(latents, tuple(runs.clean().shape[2:]))
    # Qwen-Image's guidance keeps the norm of the first pass, which is nearly a fixed mix of the passes.
    near = 0.2 if name == "qwen-image" else 0.01
    torch.testing.assert_close(error, (clean.float() - runs.clean()).square().mean()[None], rtol=near, atol=1e-9)
    # Taken up in the middle of the plain path: sampler and reference have to know what lay before.
    late = [rollout.Course((0, 1, 2, 3, 6), range(begin, 5)) for begin in (0, 3)]
    whole, part = ([*errors_of(course)][-1] for course in late)
    torch.testing.assert_close(whole, part, rtol=near, atol=1e-9)
    if corrector is not None:
        able = rollout.learnable(called, 8)
        for error in errors_of(rollout.Course(called, range(able[0], able[-1] + 1))):
            rollout.decibels(error).mean().backward()
        assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in corrector.parameters())


@pytest.mark.parametrize(("name", "sampler"), [("flux", "lcm"), ("wan-without-guidance", "heun")])
def test_samplers_that_cannot_be_taken_up_are_refused(name, sampler, tmp_path):
    """Heun's method asks the model twice a step; LCM adds noise."""
    case = CASES[name]
    pipe = case.make()
    pipe.scheduler = {**SAMPLERS, "lcm": FlowMatchLCMScheduler}[sampler]()
    told = Told(pipe, case.call)
    samples = draw_samples(tmp_path, told, {"num_inference_steps": 4}, [tiny.PROMPT], batch=1, shard=1, seed=0)
    named = type(pipe.scheduler).__name__
    with pytest.raises(ValueError, match=rf"drawn by {named}, can't be drawn anew.*take another sampler"):
        Sampler(pipe.scheduler, samples)
