"""What every architecture must do, on shrunken models in their own pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanVideoToVideoPipeline,
)
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ddit
import tiny
from ddit import PatchAdapter, ScheduleConfig
from ddit.config import Positions, Start
from ddit.generate import recorded
from ddit.models import architecture_for
from ddit.models.base import first
from ddit.schedule import Moment
from ddit.train import rollout
from ddit.train.distill import Draw, errors, make_batch
from ddit.train.sampler import Sampler
from ddit.train.samples import _seed, draw_samples


@dataclass
class Case:
    """A pipeline, and how it is called."""

    make: Callable[[], Any]
    call: dict[str, Any]
    passes: int = 1
    """Calls of the transformer in a step."""
    steps: int = 8


def embeds(seed: int, batch: int = 1) -> Tensor:
    return torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(seed)).repeat(batch, 1, 1)


VIDEO = dict(height=64, width=96, num_frames=9, prompt_embeds=embeds(1), negative_prompt_embeds=embeds(2))
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
QWEN = dict(
    height=64,
    width=96,
    prompt_embeds=embeds(1),
    prompt_embeds_mask=torch.ones(1, 6, dtype=torch.long),
    negative_prompt_embeds=embeds(2),
    negative_prompt_embeds_mask=torch.ones(1, 6, dtype=torch.long),
    true_cfg_scale=3.0,
)
EULER = FlowMatchEulerDiscreteScheduler
UNIPC = UniPCMultistepScheduler
I2V, V2V = WanImageToVideoPipeline, WanVideoToVideoPipeline

CASES = {
    "flux": Case(tiny.pipeline, dict(prompt=tiny.PROMPT, height=32, width=48, max_sequence_length=20)),
    "qwen-image": Case(tiny.qwen_pipeline, QWEN, passes=2),
    "wan": Case(tiny.wan_pipeline, VIDEO, passes=2),
    "wan-euler": Case(lambda: tiny.wan_pipeline(scheduler=EULER), VIDEO, passes=2),
    "wan-without-guidance": Case(tiny.wan_pipeline, {**VIDEO, "guidance_scale": 1.0}),
    "wan-i2v": Case(lambda: tiny.wan_pipeline(I2V), {**VIDEO, "image": PICTURE}, passes=2),
    "wan-v2v": Case(
        lambda: _video_to_video(),
        {**{k: v for k, v in VIDEO.items() if k != "num_frames"}, "video": [PICTURE] * 9, "strength": 0.9},
        passes=2,
        steps=9,
    ),
    "wan2.2-a14b": Case(lambda: tiny.wan_pipeline(two=True), VIDEO, passes=2),
    "wan2.2-ti2v": Case(lambda: tiny.wan_pipeline(expand_timesteps=True), VIDEO, passes=2),
    "wan2.2-ti2v-image": Case(
        lambda: tiny.wan_pipeline(I2V, EULER, expand_timesteps=True), {**VIDEO, "image": PICTURE}, passes=2
    ),
}
SMALL = ("flux", "qwen-image", "wan")
"""One of each transformer."""


def _video_to_video():
    made = tiny.wan_pipeline(scheduler=UNIPC)
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe = V2V(**{name: getattr(made, name) for name in names})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, case: Case, seed: int = 0, **changes) -> Tensor:
    """Latents of one run."""
    generator = torch.Generator().manual_seed(seed)
    settings = {**case.call, "num_inference_steps": case.steps, "output_type": "latent", **changes}
    return pipe(generator=generator, return_dict=False, **settings)[0]


def transformers(pipe) -> list[Any]:
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    return [model for model in found if model is not None]


def parameters(names=tuple(CASES)):
    return pytest.mark.parametrize("name", names)


@parameters()
def test_scale_one_and_removal_are_bit_equal(name):
    case = CASES[name]
    pipe = case.make()
    plain = draw(pipe, case)
    before = [set(vars(model)) for model in transformers(pipe)]
    run = ddit.apply(pipe, config=ScheduleConfig(threshold=0.0))
    assert torch.equal(draw(pipe, case), plain)
    assert len(run.report.steps) == 8 and set(run.report.scales[0]) == {1} and run.report.forced is None
    run.remove()
    assert torch.equal(draw(pipe, case), plain)
    assert [set(vars(model)) for model in transformers(pipe)] == before


@parameters()
@pytest.mark.parametrize("scale", [2, 4])
def test_large_patches_save_work_and_stay_near(name, scale):
    """Wherever they come; both passes of guidance take one decision."""
    case = CASES[name]
    pipe = case.make()
    plain = draw(pipe, case)
    shapes = []
    steps = (1, 1, scale, scale, 1, scale, scale, 1)
    with ddit.apply(pipe, config=ScheduleConfig(policy="fixed", steps=steps)) as run:
        heads = [m.get_submodule(architecture_for(m).head) for m in transformers(pipe)]
        hooks = [head.register_forward_hook(_shape(shapes)) for head in heads]
        drawn = draw(pipe, case)
        for hook in hooks:
            hook.remove()
    report = run.report
    assert report.scales == [list(steps)] and report.tokens[scale] < report.tokens[1] and report.flops_fraction < 1
    asked = sum(len(step.compared) for step in report.steps)
    assert len(shapes) == case.passes * (len(steps) + asked)
    assert {n for n in shapes} == {report.tokens[1], report.tokens[scale]}
    assert torch.isfinite(drawn).all() and not torch.equal(drawn, plain)
    assert (drawn - plain).std() < 0.5 * plain.std()


def _shape(seen: list[int]):
    def hook(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen.append(output.shape[1])

    return hook


@parameters()
def test_the_rule_decides_from_what_it_saw(name):
    case = CASES[name]
    pipe = case.make()
    with ddit.apply(pipe, config=ScheduleConfig(threshold=1e9)) as run:
        draw(pipe, case)
    assert run.report.scales == [[1, 1, 1, 4, 4, 4, 4, 4]]
    assert all(set(step.statistics[0]) == {2, 4} for step in run.report.steps[3:])


@parameters()
@pytest.mark.parametrize("start", ["noise-consistent", "bilinear"])
@pytest.mark.parametrize("positions", ["grid", "interpolated"])
def test_every_form_of_a_step_runs(name, start: Start, positions: Positions):
    case = CASES[name]
    pipe = case.make()
    config = ScheduleConfig(policy="fixed", steps=(1, 2, 4, 2), start=start, positions=positions, anchored=False)
    with ddit.apply(pipe, config=config):
        assert torch.isfinite(draw(pipe, case)).all()


@parameters()
def test_large_patches_without_an_anchor(name):
    case = CASES[name]
    pipe = case.make()
    with ddit.apply(pipe, config=ScheduleConfig(policy="fixed", steps=(4, 2, 1))):
        assert torch.isfinite(draw(pipe, case)).all()


@parameters(SMALL)
def test_positions_change_the_answer_and_centres_at_scale_one_are_the_models_own(name):
    """Interpolated positions of patches as large as the model's own are those that it counts itself."""
    case = CASES[name]
    pipe = case.make()
    with recorded(pipe) as calls:
        draw(pipe, case, num_inference_steps=2)
    inputs, answer = calls[0]
    arch, forward = architecture_for(pipe.transformer), pipe.transformer.forward
    rows, columns = (n // arch.patch_size for n in arch.latents(inputs).shape[-2:])
    interpolated = ScheduleConfig(positions="interpolated")
    with arch.placed((rows, columns), 1, interpolated):
        torch.testing.assert_close(first(forward(**{**inputs, "return_dict": False})), answer)
    low = [arch.low_velocity(forward, inputs, 2, ScheduleConfig(positions=p)) for p in ("grid", "interpolated")]
    assert low[0].shape == low[1].shape and (low[0] - low[1]).abs().max() > 1e-4
    assert not pipe.transformer.get_submodule(arch.embedding)._forward_hooks


@parameters(SMALL)
def test_a_sample_is_the_same_alone_and_in_a_batch(name):
    case = CASES[name]
    pipe = case.make()

    def settings(count: int) -> dict[str, Any]:
        many = {k: v.repeat(count, *[1] * (v.ndim - 1)) for k, v in case.call.items() if isinstance(v, Tensor)}
        return {**case.call, **many, **({"prompt": [tiny.PROMPT] * count} if "prompt" in case.call else {})}

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    class Alternating:
        def choose(self, moment: Moment) -> list[int]:
            return [1 if moment.step < 3 else (2, 4)[i % 2] for i in range(len(moment.stats))]

    call = dict(num_inference_steps=6, output_type="latent", return_dict=False)
    with ddit.apply(pipe, policy=Alternating()) as run:
        both = pipe(generator=generators(3, 4), **settings(2), **call)[0]
        assert [row[-1] for row in run.report.scales] == [2, 4]
        alone = pipe(generator=generators(3), **settings(1), **call)[0]
    torch.testing.assert_close(both[:1], alone, rtol=1e-3, atol=1e-4)


@parameters(SMALL)
def test_bfloat16(name):
    case = CASES[name]
    pipe = case.make().to(torch.bfloat16)
    given = {k: v.bfloat16() for k, v in case.call.items() if isinstance(v, Tensor) and v.is_floating_point()}
    with ddit.apply(pipe, config=ScheduleConfig(policy="fixed", steps=(1, 1, 2, 4, 1))) as run:
        assert torch.isfinite(draw(pipe, case, **given)).all()
    assert run.report.scales == [[1, 1, 2, 4, 1, 1, 1, 1]]


@parameters(SMALL)
def test_flops_at_scale_one_are_those_of_the_model(name):
    case = CASES[name]
    pipe = case.make()
    with ddit.apply(pipe, config=ScheduleConfig(policy="fixed", steps=(1, 1, 2, 4, 1))) as run:
        draw(pipe, case)
    with recorded(pipe) as calls:
        draw(pipe, case, num_inference_steps=2)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        pipe.transformer(**calls[0][0])
    assert run.report.flops[1] == counter.get_total_flops()
    assert run.report.flops[4] < run.report.flops[2] < run.report.flops[1]


# Adapters


@parameters(SMALL)
@pytest.mark.parametrize("start", ["noise-consistent", "bilinear"])
def test_a_new_adapter_is_the_training_free_step(name, start: Start):
    case = CASES[name]
    pipe = case.make()
    adapter = PatchAdapter.for_model(pipe.transformer, rank=2, start=start)
    config = ScheduleConfig(policy="fixed", steps=(1, 1, 2, 4, 2), **{"gain": 0.0, **adapter.form})
    with ddit.apply(pipe, config=config):
        free = draw(pipe, case)
    with ddit.apply(pipe, config=config, adapter=adapter):
        assert torch.equal(draw(pipe, case), free)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.02)
    with ddit.apply(pipe, config=config, adapter=adapter):
        assert not torch.equal(draw(pipe, case), free)


@parameters(SMALL)
def test_feed_forward_layers_of_every_block_are_adapted(name):
    pipe = CASES[name].make()
    adapter = PatchAdapter.for_model(pipe.transformer, rank=2)
    layers = list(adapter.config["layers"])
    blocks = {".".join(layer.split(".")[:2]) for layer in layers}
    lists = [n for n, m in pipe.transformer.named_children() if isinstance(m, nn.ModuleList)]
    assert blocks == {f"{n}.{i}" for n in lists for i in range(len(getattr(pipe.transformer, n)))}
    assert len(layers) == 2 * len(blocks)


@parameters(SMALL)
def test_saved_and_loaded_on_its_own_base_alone(name, tmp_path):
    pipe = CASES[name].make()
    PatchAdapter.for_model(pipe.transformer, rank=2).save_pretrained(tmp_path)
    loaded = PatchAdapter.from_pretrained(tmp_path)
    loaded.check(pipe.transformer)
    other = CASES["flux" if name == "wan" else "wan"].make()
    with pytest.raises(ValueError, match=type(other.transformer).__name__):
        ddit.apply(other, adapter=loaded)


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


@parameters(SMALL)
def test_an_adapter_learns_from_runs_of_its_base(name, tmp_path):
    """What `ddit train` does in a step: runs are drawn once, and every part gets a gradient from them."""
    case = CASES[name]
    pipe = case.make()
    settings = {"num_inference_steps": 8}
    drawn = dict(speedups=(4.0, 4.0), batch=1, shard=1, seed=0)
    samples = draw_samples(tmp_path, Told(pipe, case.call), settings, [tiny.PROMPT], **drawn)
    assert samples.passes == case.passes == len(samples) and sum(s == 1 for s in samples.scales[0]) == 2
    architecture = architecture_for(pipe.transformer)
    batch = make_batch(architecture, samples, [Draw(n, 2, 5) for n in range(len(samples))], "cpu", torch.float32)
    with torch.no_grad():
        answer = architecture.velocity(first(pipe.transformer(**batch.inputs)), batch.target.shape[-2:])
    torch.testing.assert_close(answer, batch.target, rtol=1e-3, atol=1e-4)
    adapter = PatchAdapter.for_model(pipe.transformer.requires_grad_(False), rank=2)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.02)
    adapter.attach(pipe.transformer)
    rows = list(range(len(samples)))
    errors(pipe.transformer, architecture, ScheduleConfig(gain=0.0), adapter, {}, batch, 2, rows).sum().backward()
    for key, parameter in adapter.named_parameters():
        used = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert used == key.startswith("parts.2"), key


ANEW = [
    *((name, None) for name in SMALL),
    *((name, sampler) for name in ("wan", "wan-without-guidance") for sampler in ("euler", "unipc", "dpm++")),
]
"""Names of cases, and samplers other than the pipeline's own."""


@pytest.mark.parametrize(("name", "sampler"), ANEW)
@pytest.mark.parametrize("learnt", [False, True])
def test_runs_drawn_anew_in_training_are_those_of_the_pipeline(name, sampler, learnt, tmp_path):
    """From the noise to the end, forecasts mended or not; and gradients reach all of the path past the model."""
    case = CASES[name]
    pipe = case.make()
    if sampler is not None:
        pipe.scheduler = SAMPLERS[sampler]()
    told = Told(pipe, case.call)
    samples = draw_samples(
        tmp_path, told, {"num_inference_steps": 8}, [tiny.PROMPT], speedups=None, batch=1, shard=1, seed=0
    )
    assert samples.passes == case.passes and set(samples.scales[0]) == {1}
    adapter = PatchAdapter.for_model(pipe.transformer.requires_grad_(False), scales=(2,), asks=False)
    torch.manual_seed(1)
    for parameter in adapter.parameters() if learnt else ():
        nn.init.normal_(parameter, std=0.05)
    adapter.attach(pipe.transformer)
    form = ScheduleConfig(**adapter.form)
    fine = rollout.plan(2.0, 2, samples.sigmas)
    runs = rollout.Runs(Sampler(pipe.scheduler, samples), [0], torch.device("cpu"), torch.float32)
    course = rollout.Course(2, fine, range(len(fine)))
    architecture = architecture_for(pipe.transformer)
    *_, error = rollout.errors(pipe.transformer, architecture, form, adapter, runs, course)
    steps = tuple(1 if i in fine else 2 for i in range(8))
    config = ScheduleConfig(policy="fixed", steps=steps, scales=(1, 2), gain=0.0)
    with ddit.apply(pipe, config=config, adapter=adapter if learnt else None):
        generators = [torch.Generator().manual_seed(_seed(0, 0))]
        latents = told([tiny.PROMPT], generator=generators, output_type="latent", num_inference_steps=8)[0]
    clean = latents if latents.ndim > 3 else architecture.velocity(latents, tuple(runs.clean().shape[-2:]))
    # Qwen-Image's guidance keeps the norm of the first pass, which is nearly a fixed mix of the passes.
    near = 0.2 if name == "qwen-image" else 0.01
    torch.testing.assert_close(error, (clean.float() - runs.clean()).square().mean()[None], rtol=near, atol=1e-9)
    # Taken up in the middle of the plain path: sampler and anchor have to know what lay before.
    late = [rollout.Course(2, (0, 1, 2, 3, 6), range(begin, 5)) for begin in (0, 3)]
    whole, part = (
        [*rollout.errors(pipe.transformer, architecture, form, adapter, runs, course)][-1] for course in late
    )
    torch.testing.assert_close(whole, part, rtol=near, atol=1e-9)
    if learnt:
        able = rollout.learnable(fine, 8)
        course = rollout.Course(2, fine, range(able[0], able[-1] + 1))
        for error in rollout.errors(pipe.transformer, architecture, form, adapter, runs, course):
            rollout.decibels(error).mean().backward()
        assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in adapter.parameters())


FLOW: dict[str, Any] = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
SAMPLERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "dpm++": lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **FLOW),
}


@pytest.mark.parametrize(("name", "sampler"), [("flux", "lcm"), ("wan-without-guidance", "heun")])
def test_samplers_that_cannot_be_taken_up_are_refused(name, sampler, tmp_path):
    """Heun's method asks the model twice a step; LCM adds noise."""
    case = CASES[name]
    pipe = case.make()
    pipe.scheduler = {**SAMPLERS, "lcm": FlowMatchLCMScheduler}[sampler]()
    call = {"num_inference_steps": 4}
    drawn = dict(speedups=None, batch=1, shard=1, seed=0)
    samples = draw_samples(tmp_path, Told(pipe, case.call), call, [tiny.PROMPT], **drawn)
    named = type(pipe.scheduler).__name__
    with pytest.raises(ValueError, match=rf"drawn by {named}, can't be drawn anew.*take another sampler"):
        Sampler(pipe.scheduler, samples)


@pytest.mark.parametrize(("steps", "dtype", "width"), [(12, "bfloat16", 48), (50, "float32", 32), (100, "float32", 32)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_speedup_holds_for_any_sampler_number_of_steps_dtype_and_size(sampler, steps, dtype, width):
    """Heun calls the model twice a step, and says so by its number of timesteps."""
    case = CASES["wan-without-guidance"]
    pipe = case.make().to(dtype=getattr(torch, dtype))
    pipe.scheduler = SAMPLERS[sampler]()
    for speedup in (1.5, 3.0):
        with ddit.apply(pipe, config=ScheduleConfig(speedup=speedup)) as run:
            draw(pipe, case, num_inference_steps=steps, width=width)
        assert len(run.report.steps) == (2 * steps - 1 if sampler == "heun" else steps)
        assert 1 / run.report.flops_fraction == pytest.approx(speedup, rel=0.05)


@pytest.mark.parametrize("name", ["WanVACETransformer3DModel", "WanAnimateTransformer3DModel"])
def test_relatives_of_wan_with_a_second_embedding_are_refused(name):
    with torch.device("meta"):
        model = getattr(diffusers, name)(num_layers=1, **({"vace_layers": [0]} if "VACE" in name else {}))
    with pytest.raises(ValueError, match=rf"{name} is not supported; supported are .*WanTransformer3DModel"):
        ddit.apply(model)
