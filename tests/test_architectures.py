"""What every architecture must do, on shrunken models in their own pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, get_args

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
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
import tiny_audio
import tiny_flux
import tiny_hunyuan
import tiny_krea2
import tiny_longcat_image
import tiny_ltx
import tiny_lumina2
import tiny_modular
import tiny_ovis_image
import tiny_qwen
import tiny_sd3
import tiny_video
import tiny_z_image
from ddit import FixedSchedule, PatchAdapter, PatchSchedule, SkipSchedule
from ddit.coarse import coarse_step
from ddit.config import FULL, Coarse, Positions, Start
from ddit.models import REGISTRY, architecture_for
from ddit.models.base import channels_first, first
from ddit.patches import TokenLayout, expand, pad_to_multiple, shrink
from ddit.pipelines.generate import guidance_scale, recorded
from ddit.schedule import StepContext


@dataclass
class Case:
    """A pipeline, and how it is called."""

    make: Callable[[], Any]
    call: dict[str, Any]
    passes: int = 1
    """Calls of the transformer in a step."""
    steps: int = 8
    rows: int = 1
    """Samples in a call for one picture: two where guidance is stacked."""
    fill: int = 1
    """The model fills up the tokens of a picture to a multiple of this."""


VIDEO = dict(height=64, width=96, num_frames=9, prompt_embeds=tiny.embeds(1), negative_prompt_embeds=tiny.embeds(2))
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
QWEN = dict(
    height=64,
    width=96,
    prompt_embeds=tiny.embeds(1),
    prompt_embeds_mask=torch.ones(1, 6, dtype=torch.long),
    negative_prompt_embeds=tiny.embeds(2),
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
FAMILIES = (
    *(tiny_audio, tiny_flux, tiny_hunyuan, tiny_krea2, tiny_longcat_image, tiny_ltx, tiny_lumina2, tiny_modular),
    *(tiny_ovis_image, tiny_qwen, tiny_sd3, tiny_video, tiny_z_image),
)
for family in FAMILIES:
    CASES.update({name: Case(**case) for name, case in family.CASES.items()})
ONE_OF_EACH = (
    *("chroma", "flux", "flux2", "flux3", "krea-2", "longcat-image", "lumina2", "ovis-image", "qwen-image"),
    *("qwen-image-2.1", "sd3", "z-image"),
    *("hunyuan-video", "hunyuan-video-1.5", "ltx", "wan", "wan-vace", "wan-animate", "skyreels-v2-forcing"),
    "ace-step",
)
SMALL = tuple(name for name in ONE_OF_EACH if name in CASES)  # an older diffusers lacks some
"""One of each transformer."""
GATED = ("ace-step", "krea-2", "lumina2", "z-image")
"""Those whose feed-forward parts have a third layer."""
PATCHED = tuple(name for name in SMALL if name != "wan-animate")
"""Those all of whose layers see patches or text: Animate has encoders of the face beside its blocks."""


def _video_to_video():
    made = tiny.wan_pipeline(scheduler=UNIPC)
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe = V2V(**{name: getattr(made, name) for name in names})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, case: Case, seed: int = 0, **changes) -> Tensor:
    """Latents of one run."""
    torch.manual_seed(seed)  # An encoder of sound draws beside the generator.
    generator = torch.Generator().manual_seed(seed)
    settings = {**case.call, "num_inference_steps": case.steps, "output_type": "latent", **changes}
    return pipe(generator=generator, return_dict=False, **settings)[0]


def lists(case: Case) -> dict[str, list[Tensor]]:
    """Arguments with a tensor for each sample."""
    return {k: v for k, v in case.call.items() if isinstance(v, list) and isinstance(v[0], Tensor)}


def transformers(pipe) -> list[Any]:
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    return [model for model in found if model is not None]


OFTEN = [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
"""All; one of each transformer in the quick run."""


AT_EACH_SCALE = [
    case if case[1] == 2 or case[0] in ("ace-step", "flux", "wan") else pytest.param(*case, marks=pytest.mark.slow)
    for case in product(CASES, (2, 4))
]


def parameters(names=tuple(CASES)):
    return pytest.mark.parametrize("name", names)


def test_every_transformer_has_a_case():
    tried = {type(CASES[name].make().transformer).__name__ for name in SMALL}
    assert tried == {name for name in REGISTRY if hasattr(diffusers, name)}


@parameters()
def test_scale_one_and_removal_are_bit_equal(name):
    case = CASES[name]
    pipe = case.make()
    plain = draw(pipe, case)
    before = [set(vars(model)) for model in transformers(pipe)]
    run = ddit.apply(pipe, patches=PatchSchedule(threshold=0.0))
    assert torch.equal(draw(pipe, case), plain)
    assert len(run.report.steps) == 8 and set(run.report.scales[0]) == {1} and run.report.forced is None
    run.remove()
    assert torch.equal(draw(pipe, case), plain)
    assert [set(vars(model)) for model in transformers(pipe)] == before


@pytest.mark.parametrize(("name", "scale"), AT_EACH_SCALE)
def test_large_patches_save_work_and_stay_near(name, scale):
    """Wherever they come; both passes of guidance take one decision."""
    case = CASES[name]
    pipe = case.make()
    plain = draw(pipe, case)
    shapes = []
    steps = (1, 1, scale, scale, 1, scale, scale, 1)
    with ddit.apply(pipe, patches=FixedSchedule(steps=steps)) as run:
        embeddings = [m.get_submodule(architecture_for(m).embedding) for m in transformers(pipe)]
        hooks = [embedding.register_forward_hook(_tokens(shapes, case.rows)) for embedding in embeddings]
        drawn = draw(pipe, case)
        for hook in hooks:
            hook.remove()
    report = run.report
    assert (
        report.scales == [list(steps)] * case.rows
        and report.tokens[scale] < report.tokens[1]
        and report.flops_fraction < 1
    )
    assert len(shapes) == case.passes * len(steps)
    assert set(shapes) == {n + -n % case.fill for n in (report.tokens[1], report.tokens[scale])}
    assert torch.isfinite(drawn).all() and not torch.equal(drawn, plain)
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 1, 1, scale, 1))):
        off = (draw(pipe, case) - plain).std()
    assert 0 < off < 0.3 * plain.std(), "a single step: with random weights the next ones see another picture"


def _tokens(seen: list[int], rows: int):
    def hook(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output = output.unflatten(0, (rows, -1)) if output.ndim == 2 else output  # all samples in a row
        seen.append(output[0, 0].numel() if channels_first(layer) else output.shape[1])

    return hook


@parameters(OFTEN)
def test_the_rule_decides_from_what_it_saw(name):
    case = CASES[name]
    pipe = case.make()
    with ddit.apply(pipe, patches=PatchSchedule(threshold=1e9, careful=False)) as run:
        draw(pipe, case)
    assert run.report.scales == [[1, 1, 1, 4, 4, 4, 4, 4]] * case.rows
    assert all(set(step.statistics[0]) == {2, 4} for step in run.report.steps[3:])


@parameters(OFTEN)
def test_every_form_of_a_step_runs_and_is_another(name):
    case = CASES[name]
    pipe = case.make()
    drawn = []
    for start, positions in product(get_args(Start), get_args(Positions)):
        coarse = Coarse(start=start, positions=positions)
        with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 2, 4, 2), coarse=coarse)):
            drawn.append(draw(pipe, case))
    assert len(drawn) == 4 and all(torch.isfinite(latents).all() for latents in drawn)
    assert not any(torch.allclose(one, other, atol=1e-3) for one, other in combinations(drawn, 2))


@parameters(OFTEN)
def test_a_coarse_step_needs_none_before_it(name):
    """The first one, too, is that of the model at the noise it got."""
    case = CASES[name]
    pipe = case.make()
    plain = draw(pipe, case)
    with ddit.apply(pipe, patches=FixedSchedule(steps=(4, 2, 1))) as run:
        drawn = draw(pipe, case)
    assert run.report.strip().startswith("4 2 1 1")
    assert torch.isfinite(drawn).all() and drawn.std() < 3 * plain.std() and not torch.allclose(drawn, plain)


@parameters(SMALL)
def test_positions_change_the_answer_and_centres_at_scale_one_are_the_models_own(name):
    """Interpolated positions of patches as large as the model's own are those that it counts itself."""
    case = CASES[name]
    pipe = case.make()
    with recorded(pipe) as calls:
        draw(pipe, case, num_inference_steps=2)
    inputs, answer = calls[0]
    arch, forward = architecture_for(pipe.transformer), pipe.transformer.forward
    noisy, grid, interpolated = arch.read(inputs), Coarse(), Coarse(positions="interpolated")
    with arch.placed(TokenLayout.of(noisy.latents, arch.patch_size, positions="interpolated")):
        torch.testing.assert_close(first(forward(**{**inputs, "return_dict": False})), answer)
    low = [coarse_step(arch, forward, inputs, noisy, 2, coarse) for coarse in (grid, interpolated)]
    assert low[0].shape == low[1].shape and (low[0] - low[1]).abs().max() > 1e-4
    assert not pipe.transformer.get_submodule(arch.embedding)._forward_hooks


@parameters(SMALL)
@pytest.mark.parametrize("scale", [2, 4])
def test_a_model_that_knows_the_picture_is_exact_in_what_pooling_keeps(name, scale):
    """The velocity of clean latents x is (z - x) / sigma, at every scale, whatever a model predicts instead."""
    case = CASES[name]
    pipe = case.make()
    with recorded(pipe) as calls:
        draw(pipe, case, num_inference_steps=3)
    (inputs, answer), arch = calls[1], architecture_for(pipe.transformer)
    noisy, whole = arch.read(inputs), scale * arch.patch_size * arch.grid_multiple
    clean = torch.randn(noisy.latents.shape, generator=torch.Generator().manual_seed(0))
    exact = (noisy.latents - clean) / expand(noisy.sigma, clean)
    assert arch.velocity(answer, clean.shape[2:]).shape == clean.shape
    torch.testing.assert_close(arch.velocity(arch.output(exact, inputs), clean.shape[2:]), exact)

    def pooled(z: Tensor) -> Tensor:
        return shrink(pad_to_multiple(z, whole), scale, arch.patch_size, "noise-consistent")

    def knowing(**small: Any) -> tuple[Tensor]:
        asked = arch.read(small)
        return (arch.output((asked.latents - pooled(clean)) / expand(asked.sigma, clean), small),)

    velocity = coarse_step(arch, knowing, inputs, noisy, scale, Coarse())
    inner = [slice(n // scale) for n in clean.shape[-arch.axes :]]  # of a patch beyond the edge the inner part alone
    found, wanted = (pooled(v)[(..., *inner)] for v in (velocity, exact))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@parameters(SMALL)
def test_the_sampler_goes_along_the_velocity(name):
    """Noise falls, and the latents go where the velocity points, though guidance turns them: its sign is right."""
    case = CASES[name]
    pipe = case.make()
    with recorded(pipe) as calls:
        draw(pipe, case)
    (inputs, answer), (later, _), arch = calls[0], calls[case.passes], architecture_for(pipe.transformer)
    here, there = arch.read(inputs), arch.read(later)
    assert (here.sigma > there.sigma).all() and (here.sigma <= 1).all()
    went = (there.latents - here.latents) / expand(there.sigma - here.sigma, here.latents)
    velocity = arch.velocity(answer, here.latents.shape[2:])
    assert (torch.cosine_similarity(went.flatten(1), velocity.flatten(1)) > 0).all()


@parameters([name for name in SMALL if name not in ("wan-vace", "skyreels-v2-forcing")])
def test_a_sample_is_the_same_alone_and_in_a_batch(name):
    case = CASES[name]
    pipe = case.make()

    def settings(count: int) -> dict[str, Any]:
        many = {k: v.repeat(count, *[1] * (v.ndim - 1)) for k, v in case.call.items() if isinstance(v, Tensor)}
        words = {k: [v] * count for k, v in case.call.items() if isinstance(v, str)}
        many.update({k: v * count for k, v in lists(case).items()})
        return {**case.call, **many, **words}

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    class Alternating:
        scales = (1, 2, 4)

        def choose(self, context: StepContext) -> list[int]:
            pictures = context.batch // case.rows
            return [1 if context.step < 3 else (2, 4)[i % pictures] for i in range(context.batch)]

    call = dict(num_inference_steps=6, output_type="latent", return_dict=False)
    with ddit.apply(pipe, patches=Alternating()) as run:
        both = pipe(generator=generators(3, 4), **settings(2), **call)[0]
        assert [row[-1] for row in run.report.scales] == [2, 4] * case.rows
        alone = pipe(generator=generators(3), **settings(1), **call)[0]
    torch.testing.assert_close(both[:1], alone, rtol=1e-3, atol=1e-4)


@parameters(SMALL)
def test_bfloat16(name):
    case = CASES[name]
    pipe = case.make().to(torch.bfloat16)
    given = {k: v.bfloat16() for k, v in case.call.items() if isinstance(v, Tensor) and v.is_floating_point()}
    given.update({k: [t.bfloat16() for t in v] for k, v in lists(case).items()})
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 1, 2, 4, 1))) as run:
        assert torch.isfinite(draw(pipe, case, **given)).all()
    assert run.report.scales == [[1, 1, 2, 4, 1, 1, 1, 1]] * case.rows


@parameters(PATCHED)
def test_flops_at_scale_one_are_those_of_the_model(name):
    case = CASES[name]
    pipe = case.make()
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 1, 2, 4, 1))) as run:
        draw(pipe, case)
    with recorded(pipe) as calls:
        draw(pipe, case, num_inference_steps=2)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        pipe.transformer(**calls[0][0])
    assert run.report.flops[1] * case.rows == counter.get_total_flops()
    assert run.report.flops[4] < run.report.flops[2] < run.report.flops[1]


# Adapters


@pytest.mark.parametrize(
    ("name", "start"), [*product(SMALL, ["noise-consistent"]), *product(["flux", "wan", "ace-step"], ["bilinear"])]
)
def test_a_new_adapter_is_the_training_free_step(name, start: Start):
    case = CASES[name]
    pipe = case.make()
    adapter = PatchAdapter.for_model(pipe.transformer, rank=2, start=start)
    schedule = FixedSchedule(steps=(1, 1, 2, 4, 2), coarse=adapter.coarse)
    with ddit.apply(pipe, patches=schedule):
        free = draw(pipe, case)
    with ddit.apply(pipe, patches=schedule, adapter=adapter):
        assert torch.equal(draw(pipe, case), free)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.02)
    with ddit.apply(pipe, patches=schedule, adapter=adapter):
        assert not torch.equal(draw(pipe, case), free)


@parameters([name for name in PATCHED if name != "flux3"])
def test_feed_forward_layers_of_every_block_are_adapted(name):
    """But of those that see the prompt alone."""
    pipe = CASES[name].make()
    adapter = PatchAdapter.for_model(pipe.transformer, rank=2)
    layers = list(adapter.config["layers"])
    blocks = {".".join(layer.split(".")[:2]) for layer in layers}
    lists = [n for n, m in pipe.transformer.named_children() if isinstance(m, nn.ModuleList) and n != "context_refiner"]
    assert blocks == {f"{n}.{i}" for n in lists for i in range(len(getattr(pipe.transformer, n)))}
    assert len(layers) == (3 if name in GATED else 2) * len(blocks)


@parameters(SMALL)
def test_saved_and_loaded_on_its_own_base_alone(name, tmp_path):
    pipe = CASES[name].make()
    PatchAdapter.for_model(pipe.transformer, rank=2).save_pretrained(tmp_path)
    loaded = PatchAdapter.from_pretrained(tmp_path)
    loaded.check(pipe.transformer)
    other = CASES["flux" if name == "wan" else "wan"].make()
    with pytest.raises(ValueError, match=type(other.transformer).__name__):
        ddit.apply(other, adapter=loaded)


FLOW: dict[str, Any] = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
SAMPLERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "dpm++": lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **FLOW),
}


@pytest.mark.parametrize(("steps", "dtype", "width"), [(12, "bfloat16", 48), (50, "float32", 32), (100, "float32", 32)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_speedup_holds_for_any_sampler_number_of_steps_dtype_and_size(sampler, steps, dtype, width):
    """Heun calls the model twice a step, and says so by its number of timesteps."""
    case = CASES["wan-without-guidance"]
    pipe = case.make().to(dtype=getattr(torch, dtype))
    pipe.scheduler = SAMPLERS[sampler]()
    for speedup in (1.5, 3.0):
        with ddit.apply(pipe, patches=FULL, skip=SkipSchedule(speedup=speedup)) as run:
            draw(pipe, case, num_inference_steps=steps, width=width)
        assert len(run.report.steps) == (2 * steps - 1 if sampler == "heun" else steps)
        assert 1 / run.report.flops_fraction == pytest.approx(speedup, rel=0.05)


@pytest.mark.parametrize(
    "name", [n for n in ("wan", "chroma", "hunyuan-video-1.5", "krea-2", "z-image", "sd3", "ovis-image") if n in CASES]
)
def test_guidance_is_as_strong_as_its_scale_says(name, monkeypatch):
    """What the sampler gets, against ``uncond + g (cond - uncond)`` of the model's two answers."""
    case = CASES[name]
    pipe = case.make()
    taken, step = [], pipe.scheduler.step
    monkeypatch.setattr(
        pipe.scheduler, "step", lambda output, *a, **k: (taken.append(output.clone()), step(output, *a, **k))[1]
    )
    with recorded(pipe) as calls:
        draw(pipe, case)
    architecture = architecture_for(pipe.transformer)
    size = architecture.read(calls[0][0]).latents.shape[2:]
    answers = [architecture.velocity(answer, size) for _, answer in calls[: case.passes]]
    one, two = answers if case.passes == 2 else answers[0].chunk(2)
    guided = (
        taken[0]
        if taken[0].numel() == one.numel() and taken[0].ndim == one.ndim
        else architecture.velocity(taken[0], size)
    )
    table = torch.stack([one.reshape(-1), two.reshape(-1)], 1).float()
    found = torch.linalg.lstsq(table, guided.reshape(-1, 1).float()).solution.abs().flatten().tolist()
    scale = guidance_scale(pipe, {k: v for k, v in case.call.items() if isinstance(v, int | float)})
    assert sorted(found) == pytest.approx([scale - 1, scale], abs=1e-3)
