"""Training on every architecture, on shrunken models in their own pipelines."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import tiny
import tiny_z_image
from ddit import PatchAdapter
from ddit.models import architecture_for
from ddit.models.base import first
from ddit.train.arguments import arguments
from ddit.train.distill import Draw, errors, make_batch
from ddit.train.samples import draw_samples
from test_architectures import CASES, SMALL, parameters

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

    def __call__(self, prompt: list[str], **settings) -> Any:
        return self.pipe(**self.given, **settings)


@parameters(TRAINED)
def test_an_adapter_learns_from_runs_of_its_base(name, tmp_path):
    """What `ddit train` does in a step: runs are drawn once, and every part gets a gradient from them."""
    case = CASES[name]
    pipe = case.make()
    told = Told(pipe, case.call)
    samples = draw_samples(tmp_path, told, {"num_inference_steps": 8}, [tiny.PROMPT], batch=1, seed=0)
    assert samples.passes == case.passes * case.rows == len(samples) and len(samples.sigmas) == 8
    architecture = architecture_for(pipe.transformer)
    for which in range(samples.passes):
        batch = make_batch(architecture, samples, [Draw(0, 2, 5)], which, "cpu", torch.float32)
        with torch.no_grad():
            answer = architecture.velocity(first(pipe.transformer(**batch.inputs)), batch.target.shape[2:])
        torch.testing.assert_close(answer, batch.target, rtol=1e-3, atol=1e-4)
    adapter = PatchAdapter.for_model(pipe.transformer.requires_grad_(False), rank=2)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.02)
    adapter.attach(pipe.transformer)
    errors(pipe.transformer, architecture, adapter.coarse, adapter, {}, batch, 2, [0]).square().sum().backward()
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
        samples = draw_samples(tmp_path / str(batch), told, settings, ["a"] * 4, batch=batch, seed=0)
        assert samples.passes == 2 and len(samples) == 8
        loaded = [samples.load([i], [[0, 2]]) for i in range(8)]
        found.append([(latents, velocity, samples.clean(i)) for i, (latents, velocity, _) in enumerate(loaded)])
    for one, other in zip(*found, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    starts = {float(latents[0, 0].sum()) for latents, _, _ in found[0]}
    assert len(starts) == 4


def test_a_prompt_that_serves_a_whole_call_becomes_each_samples():
    """LongCat-Image's negative one."""
    own = {"hidden_states": torch.zeros(3, 4, 2), "encoder_hidden_states": torch.arange(6.0).reshape(1, 3, 2)}
    rows, _ = arguments(own, 1, ("hidden_states", "encoder_hidden_states"), ())
    assert torch.equal(rows["row1/encoder_hidden_states"], own["encoder_hidden_states"].repeat(3, 1, 1))
