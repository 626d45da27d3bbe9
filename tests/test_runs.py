"""What happens to a run under `ddit.apply`: schedules, guidance, batches, other pipelines, grids, obstacles, skips."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

import ddit
import tiny
from ddit import FixedSchedule, PatchSchedule, SkipSchedule
from ddit.config import FULL, Coarse, Positions, Start
from ddit.models import architecture_for
from ddit.preset import Preset
from ddit.profile import ErrorProfile
from ddit.sampler import adds_noise
from helpers import COARSE, GUIDED, PLAIN, STEPS, Record, call_inputs, denoise, facts, fixed, kept, noise, skipping
from test_architectures import CASES, draw

# --- schedules ---


def test_huge_threshold_is_coarsest_after_warmup(pipe):
    """And the transformer really runs on fewer tokens."""
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe, patches=PatchSchedule(threshold=1e9, warmup=5, careful=False))
    tiny.sample(pipe)
    assert handle.report.strip() == "1 1 1 1 1 4 4 4"
    assert record.tokens == [64] * 5 + [4] * 3
    assert len(handle.report.steps[2].statistics[0]) == 0
    assert set(handle.report.steps[3].statistics[0]) == {2, 4}


@pytest.mark.parametrize("order", [1, 2, 3])
def test_statistics_begin_after_order_steps(pipe, order):
    handle = ddit.apply(pipe, patches=PatchSchedule(threshold=0, order=order, warmup=order))
    tiny.sample(pipe)
    assert [bool(step.statistics[0]) for step in handle.report.steps] == [False] * order + [True] * (STEPS - order)


def test_fixed_policy(pipe):
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe, patches=fixed(4, 2, 1, 2))
    tiny.sample(pipe)
    assert handle.report.strip() == "4 2 1 2 2 2 2 2"
    assert record.tokens == [4, 16, 64, *[16] * 5]


def test_custom_policy_sees_step_total_and_statistics(pipe):
    seen = []

    class Mine:
        scales: tuple[int, ...] = (1, 2)
        needs_statistics = True

        def choose(self, context):
            seen.append((context.step, context.total, context.batch, list(context.statistics[0]), context.sigma))
            return [2 if context.step % 2 else 1] * context.batch

    handle = ddit.apply(pipe, patches=Mine())
    tiny.sample(pipe, num_images_per_prompt=2)
    assert handle.report.scales == [[1, 2] * 4] * 2
    sigmas = [step.sigma for step in handle.report.steps]
    assert seen == [(i, STEPS, 2, [2] if i >= 3 else [], sigmas[i]) for i in range(STEPS)]


@pytest.mark.parametrize("chosen", [[3], [8], [], [1, 1], ["2"], [None], None, 2])
def test_nonsense_of_a_policy_is_refused(chosen):
    class Bad:
        scales: tuple[int, ...] = (1, 2, 4)

        def choose(self, context):
            return chosen

    transformer = tiny.transformer()
    with ddit.apply(transformer, patches=Bad()), pytest.raises(ValueError, match="the policy chose"):
        transformer(**call_inputs())


@pytest.mark.parametrize("start", ["noise-consistent", "bilinear"])
@pytest.mark.parametrize("positions", ["grid", "interpolated"])
@pytest.mark.parametrize("measured", [False, True])
def test_every_setting_of_the_coarse_step_runs(start: Start, positions: Positions, measured):
    variance = {2: [0.1] * 4, 4: [0.2] * 4} if measured else None
    schedule = FixedSchedule(steps=(1, 2, 4), coarse=Coarse(start=start, positions=positions))
    transformer = tiny.transformer()
    ddit.apply(transformer, patches=schedule, detail_variance=variance)
    latents = denoise(transformer, steps=4)
    assert latents.isfinite().all() and latents.std() > 0.1


# --- one generation, the next, and broken ones ---


class Stop(Exception):
    pass


def stop_after(step):
    def callback(pipe, i, t, kwargs):
        if i == step:
            raise Stop
        return kwargs

    return callback


@pytest.mark.parametrize(("step", "seed"), [(0, 0), (0, 1), (1, 1), (3, 0), (6, 1)])
def test_a_run_after_a_broken_one_equals_a_fresh_one(pipe, step, seed):
    """The broken run stops after any step, and the next has the same noise or another."""
    fresh, schedule = tiny.pipeline(), fixed(1, 2, 4, 1, 2)
    expected = ddit.apply(fresh, patches=schedule)
    latents = tiny.sample(fresh, seed=0)
    handle = ddit.apply(pipe, patches=schedule)
    with pytest.raises(Stop):
        tiny.sample(pipe, seed=seed, callback_on_step_end=stop_after(step))
    assert torch.equal(tiny.sample(pipe, seed=0), latents)
    assert handle.report.scales == expected.report.scales
    assert [s.sigma for s in handle.report.steps] == [s.sigma for s in expected.report.steps]


def test_a_shorter_run_after_a_broken_one_starts_anew():
    """Image-to-image begins at a lower noise level than where the broken run stopped."""
    schedule = fixed(1, 2, 4, 1)
    pipes = [tiny.pipeline(FluxImg2ImgPipeline) for _ in range(2)]
    handles = [ddit.apply(p, patches=schedule) for p in pipes]
    picture: dict[str, Any] = dict(image=torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(Stop):
        tiny.sample(pipes[0], strength=1.0, callback_on_step_end=stop_after(2), **picture)
    results = [tiny.sample(p, strength=0.5, **picture) for p in pipes]
    assert handles[0].report.scales == handles[1].report.scales
    assert torch.equal(*results)


def test_an_error_inside_the_transformer_resets(pipe):
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe, patches=fixed(2))
    record.raises = True
    with pytest.raises(RuntimeError, match="broken"):
        tiny.sample(pipe)
    assert handle.scales == []
    with pytest.raises(RuntimeError, match="no report"):
        _ = handle.report
    record.raises = False
    tiny.sample(pipe)
    assert len(handle.report.steps) == STEPS


def test_removal_is_exact_after_a_broken_run(pipe):
    plain = tiny.sample(pipe)
    before = facts(pipe)
    handle = ddit.apply(pipe, patches=fixed(2, 4))
    with pytest.raises(Stop):
        tiny.sample(pipe, callback_on_step_end=stop_after(2))
    handle.remove()
    assert {k: v for k, v in facts(pipe).items() if k[0] != "pipe"} == {
        k: v for k, v in before.items() if k[0] != "pipe"
    }
    assert torch.equal(tiny.sample(pipe), plain)


def test_latents_are_let_go_when_a_pipeline_call_ends(pipe):
    """The pipeline resets its components' caches; the report stays, the tensors don't."""
    handle = ddit.apply(pipe, patches=COARSE)
    before = kept(handle)
    tiny.sample(pipe)
    assert kept(handle) - before < 64 * 16 / 2
    assert handle.report.strip() == "1 1 1 4 4 4 4 4"


@pytest.mark.parametrize("order", [1, 2, 3])
def test_no_more_latents_are_kept_than_the_order_needs(pipe, order):
    handle, counts = ddit.apply(pipe, patches=PatchSchedule(threshold=0, order=order)), []
    before = kept(handle)

    def callback(pipe, i, t, kwargs):
        counts.append((kept(handle) - before) // (64 * 16))
        return kwargs

    tiny.sample(pipe, callback_on_step_end=callback)
    assert counts == [min(i + 1, order + 1) for i in range(STEPS)]


@pytest.mark.parametrize(("skip", "most"), [(SkipSchedule(speedup=2), 4), (SkipSchedule(threshold=0.01), 7)])
def test_skipping_keeps_a_line_of_each_pass(pipe, skip, most):
    """Two answers with their clean latents; the rule also the path's last three velocities."""
    handle, counts = ddit.apply(pipe, patches=FULL, skip=skip), []
    before = kept(handle)
    tiny.sample(pipe, callback_on_step_end=lambda *_: counts.append(kept(handle) - before) or {})
    assert max(counts) / (64 * 16) < most + 1.3  # and the step's own latents


def test_a_bare_transformer_starts_over_when_the_timestep_rises():
    transformer = tiny.transformer()
    handle = ddit.apply(transformer, patches=fixed(1, 2, 4, 1))
    first = denoise(transformer)
    assert len(handle.report.steps) == STEPS
    assert torch.equal(denoise(transformer), first)
    assert handle.report.strip() == "1 2 4 1 1 1 1 1"


def test_a_bare_transformer_starts_over_when_the_shape_changes():
    """Even at a lower noise level: another grid, another batch."""
    transformer = tiny.transformer()
    handle = ddit.apply(transformer, patches=fixed(1, 2))
    changes: list[dict[str, Any]] = [dict(), dict(grid=(4, 6)), dict(batch=2), dict(batch=1)]
    for kwargs in changes:
        with torch.no_grad():
            transformer(**call_inputs(sigma=0.9, **kwargs))
            transformer(**call_inputs(sigma=0.8, seed=1, **kwargs))
        assert handle.report.strip() == "1 2"


def test_sizes_may_change_between_runs(pipe):
    handle = ddit.apply(pipe, patches=fixed(2))
    for size, tokens in (((32, 32), (64, 16)), ((16, 48), (48, 12)), ((20, 28), (35, 12))):
        tiny.sample(pipe, size=size)
        assert handle.report.tokens == {1: tokens[0], 2: tokens[1]}


def test_inference_mode(pipe):
    with ddit.apply(pipe, patches=fixed(1, 2, 4)), torch.inference_mode():
        inside = tiny.sample(pipe)
    with ddit.apply(pipe, patches=fixed(1, 2, 4)):
        assert torch.equal(tiny.sample(pipe), inside)


def test_gradients_flow_through_a_coarse_step():
    """A distillation needs them."""
    transformer = tiny.transformer()
    ddit.apply(transformer, patches=fixed(2))
    transformer(**call_inputs()).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in transformer.parameters())


# --- batches and guidance ---


def test_a_sample_is_the_same_alone_and_in_a_batch(pipe):
    """Every sample its own schedule, so that a batch mixes scales in a step."""
    tables = [[1, 1, 2, 4], [1, 2, 1, 2], [4, 4, 1, 1], [1, 1, 2, 2]]
    prompts, z = [tiny.PROMPT, "a large red circle", tiny.PROMPT, ""], noise(4)
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe, patches=tiny.Table(*tables))
    together = tiny.sample(pipe, prompt=prompts, latents=z, steps=4)
    assert handle.report.scales == tables
    assert sorted(record.tokens[:2]) == [4, 64]  # a group for each scale of the first step
    for i, table in enumerate(tables):
        handle = ddit.apply(pipe, patches=tiny.Table(table))
        alone = tiny.sample(pipe, prompt=prompts[i], latents=z[i : i + 1], steps=4)
        assert handle.report.scales == [table]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_samples_of_one_scale_share_a_call(pipe):
    record = Record(pipe.transformer)
    ddit.apply(pipe, patches=tiny.Table([1, 1], [2, 1], [2, 2]))
    tiny.sample(pipe, steps=2, num_images_per_prompt=3)
    assert [(c["hidden_states"].shape[:2]) for c in record.calls] == [(1, 64), (2, 16), (2, 64), (1, 16)]


def test_the_rule_decides_for_each_sample(pipe):
    """A threshold between the samples' statistics: they part, and each goes the way it goes alone."""
    z = noise(4) * torch.tensor([0.5, 1.0, 1.0, 2.0]).reshape(4, 1, 1)
    handle = ddit.apply(pipe, patches=PLAIN)
    tiny.sample(pipe, latents=z, num_images_per_prompt=4)
    values = sorted(stats[2] for step in handle.report.steps[3:] for stats in step.statistics)
    gaps = [(b / a, (a * b) ** 0.5) for a, b in itertools.pairwise(values)]
    middle = max(gaps[len(gaps) // 4 : -len(gaps) // 4])[1]
    schedule = PatchSchedule(threshold=middle, careful=False)
    handle = ddit.apply(pipe, patches=schedule)
    together = tiny.sample(pipe, latents=z, num_images_per_prompt=4)
    schedules = handle.report.scales
    assert len({tuple(s) for s in schedules}) > 1
    for i in range(4):
        handle = ddit.apply(pipe, patches=schedule)
        alone = tiny.sample(pipe, latents=z[i : i + 1])
        assert handle.report.scales == [schedules[i]]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_num_images_per_prompt(pipe):
    handle = ddit.apply(pipe, patches=COARSE)
    latents = tiny.sample(pipe, prompt=["a large red circle", ""], num_images_per_prompt=3)
    assert latents.shape[0] == 6
    assert handle.report.scales == [[1, 1, 1, 4, 4, 4, 4, 4]] * 6


@pytest.mark.parametrize("schedule", [COARSE, fixed(1, 2, 4, 2)], ids=["dynamic", "fixed"])
def test_both_guidance_passes_take_one_decision(pipe, schedule):
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe, patches=schedule)
    tiny.sample(pipe, **GUIDED)
    assert len(handle.report.steps) == STEPS
    assert len(record.calls) == 2 * STEPS
    assert record.tokens == [64 // s**2 for s in handle.report.scales[0] for _ in range(2)]


def test_guidance_is_bit_equal_at_threshold_zero(pipe):
    plain = tiny.sample(pipe, **GUIDED)
    handle = ddit.apply(pipe, patches=PLAIN)
    assert torch.equal(tiny.sample(pipe, **GUIDED), plain)
    assert len(handle.report.steps) == STEPS


@pytest.mark.parametrize("skip", [None, SkipSchedule(speedup=1.5)])
def test_each_guidance_pass_has_its_own_forecast(pipe, skip):
    """Passes with the same prompt equal a run without guidance, whose step is the same mixture."""
    ddit.apply(pipe, patches=fixed(1, 2, 4, 1), skip=skip)
    once = tiny.sample(pipe)
    twice = tiny.sample(pipe, negative_prompt=tiny.PROMPT, true_cfg_scale=3.0)
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-5)


def test_guidance_embedding(pipe):
    """As FLUX.1-dev: the guidance scale is an input, one per sample."""
    pipe = tiny.pipeline(guidance_embeds=True)
    plain = tiny.sample(pipe, guidance_scale=3.5, num_images_per_prompt=2)
    with ddit.apply(pipe, patches=PLAIN):
        assert torch.equal(tiny.sample(pipe, guidance_scale=3.5, num_images_per_prompt=2), plain)
    handle = ddit.apply(pipe, patches=tiny.Table([1, 2], [4, 1]))
    tiny.sample(pipe, guidance_scale=3.5, num_images_per_prompt=2)
    assert handle.report.scales == [[1] + [2] * 7, [4] + [1] * 7]


# --- other pipelines ---


def picture(seed=0):
    return Image.effect_noise((32, 32), 60).convert("RGB") if seed else Image.new("RGB", (32, 32), "red")


@pytest.mark.parametrize("cls", [FluxImg2ImgPipeline, FluxInpaintPipeline])
def test_img2img_and_inpaint(cls):
    """Bit-equal at threshold 0; coarse at a large one; the report has the steps that ran."""
    pipe = tiny.pipeline(cls)
    kwargs: dict[str, Any] = dict(image=picture(), strength=0.6, steps=10)
    if cls is FluxInpaintPipeline:
        mask = Image.new("L", (32, 32), 0)
        mask.paste(255, (8, 8, 24, 32))
        kwargs["mask_image"] = mask
    plain = tiny.sample(pipe, **kwargs)
    with ddit.apply(pipe, patches=PLAIN) as handle:
        assert torch.equal(tiny.sample(pipe, **kwargs), plain)
        assert handle.report.scales == [[1] * 6]
    with ddit.apply(pipe, patches=COARSE) as handle:
        assert not torch.equal(tiny.sample(pipe, **kwargs), plain)
        assert handle.report.scales == [[1, 1, 1, 4, 4, 4]]
        assert handle.report.steps[0].sigma < 0.9
    assert torch.equal(tiny.sample(pipe, **kwargs), plain)


def test_bfloat16_pipeline(pipe):
    """Bit-equal at threshold 0, bfloat16 out, and statistics far below the rounding of bfloat16."""
    pipe.to(torch.bfloat16)
    plain = tiny.sample(pipe)
    with ddit.apply(pipe, patches=PLAIN) as handle:
        assert torch.equal(tiny.sample(pipe), plain)
        assert handle.report.scales == [[1] * STEPS]
    record = Record(pipe.transformer)
    ddit.apply(pipe, patches=fixed(1, 2, 4))
    latents = tiny.sample(pipe)
    assert latents.dtype == torch.bfloat16 and latents.isfinite().all()
    for call in record.calls:
        assert call["hidden_states"].dtype == call["timestep"].dtype == torch.bfloat16
    assert record.calls[1]["img_ids"].dtype == torch.float32  # half positions need it


def test_bfloat16_statistics_agree_with_float32(pipe):
    """Same weights and noise, 50 steps: the rule sees the same in both, though timesteps are rounded in one."""
    tables = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe.to(dtype)
        handle = ddit.apply(pipe, patches=PLAIN)
        tiny.sample(pipe, steps=50, latents=noise(1).bfloat16().to(dtype))
        tables.append(torch.tensor([step.statistics[0][2] for step in handle.report.steps[3:]]))
    wide, narrow = tables
    assert (narrow - wide).abs().median() < 5e-4


# --- grids ---


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("grid", [(5, 7), (1, 1), (1, 9), (8, 4), (3, 2)])
def test_grids_that_do_not_divide_are_padded(grid, scale):
    transformer = tiny.transformer()
    record = Record(transformer)
    handle = ddit.apply(transformer, patches=fixed(1, scale, scale, 1))
    ours = denoise(transformer, steps=4, grid=grid)
    assert ours.shape == (1, grid[0] * grid[1], 16) and ours.isfinite().all()
    padded = -(-grid[0] // scale) * -(-grid[1] // scale)
    assert record.tokens == [grid[0] * grid[1], padded, padded, grid[0] * grid[1]]
    assert handle.report.tokens == {1: grid[0] * grid[1], scale: padded}


def test_a_pipeline_with_a_grid_that_does_not_divide(pipe):
    """5 x 7 tokens at scale 4 are 2 x 2."""
    handle = ddit.apply(pipe, patches=fixed(1, 4))
    assert tiny.sample(pipe, size=(20, 28)).shape == (1, 35, 16)
    assert handle.report.tokens == {1: 35, 4: 4}


@pytest.mark.parametrize(
    ("positions", "rows", "columns"),
    [("grid", [3, 4], [5, 6, 7]), ("interpolated", [3.5, 5.5], [5.5, 7.5, 9.5])],
)
def test_positions_count_from_the_first_token(positions: Positions, rows, columns):
    """img_ids that don't begin at zero, on a grid that is not square."""
    transformer = tiny.transformer()
    record = Record(transformer)
    ddit.apply(transformer, patches=FixedSchedule(steps=(2,), coarse=Coarse(positions=positions)))
    transformer(**call_inputs(grid=(4, 6), origin=(3, 5)))
    ids = record.calls[0]["img_ids"]
    assert ids.tolist() == [[0, r, c] for r in rows for c in columns]


def test_positions_with_a_batch_axis():
    """Older callers pass [B, N, 3]; diffusers still takes them."""
    transformer = tiny.transformer()
    ddit.apply(transformer, patches=fixed(1, 2, 4))
    inputs = call_inputs(batch=2)
    flat = [transformer(**inputs | dict(timestep=torch.full((2,), s))).sample for s in (0.9, 0.8, 0.7)]
    inputs["img_ids"] = inputs["img_ids"].expand(2, -1, -1)
    deep = [transformer(**inputs | dict(timestep=torch.full((2,), s))).sample for s in (0.9, 0.8, 0.7)]
    assert all(torch.equal(a, b) for a, b in zip(flat, deep, strict=True))


def test_a_coarse_call_leaves_its_arguments_alone():
    transformer = tiny.transformer()
    ddit.apply(transformer, patches=fixed(2))
    inputs = call_inputs(joint_attention_kwargs={"scale": 1.0})
    copies = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    transformer(**inputs)
    assert all(torch.equal(inputs[k], v) for k, v in copies.items())
    assert inputs["joint_attention_kwargs"] == {"scale": 1.0}


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_return_dict_is_honoured(scale):
    transformer = tiny.transformer()
    ddit.apply(transformer, patches=fixed(scale))
    default = transformer(**call_inputs())
    wrapped = transformer(**call_inputs(return_dict=True))
    plain = transformer(**call_inputs(return_dict=False))
    assert isinstance(plain, tuple) and len(plain) == 1
    assert type(default) is type(wrapped) and default.sample.shape == (1, 16, 16)
    torch.testing.assert_close(wrapped.sample, plain[0])


def test_positional_arguments():
    transformer = tiny.transformer()
    inputs = call_inputs()
    ddit.apply(transformer, patches=fixed(2))
    named = transformer(**inputs).sample
    torch.testing.assert_close(transformer(*inputs.values()).sample, named)


# --- calls that must stay full ---


def scattered(inputs):
    ids = inputs["img_ids"].clone()
    ids[-1] = ids[-2]
    return inputs | dict(img_ids=ids)


def attention(inputs):
    return inputs | dict(joint_attention_kwargs={"attention_mask": None})


OBSTACLES = [(scattered, "img_ids"), (attention, "attention_mask")]


@pytest.mark.parametrize(("change", "word"), OBSTACLES, ids=[w for _, w in OBSTACLES])
@torch.no_grad()
def test_an_obstacle_forces_full_steps_with_one_warning(change, word):
    transformer = tiny.transformer()
    if change is attention:
        transformer.transformer_blocks, transformer.single_transformer_blocks = (torch.nn.ModuleList(),) * 2
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.2]
    calls = [change(call_inputs(sigma=s)) for s in sigmas]
    plain = [transformer(**c).sample for c in calls]
    handle = ddit.apply(transformer, patches=fixed(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            ours = [transformer(**c).sample for c in calls]
    messages = [str(w.message) for w in caught if "ddit" in str(w.message)]
    assert len(messages) == 1 and word in messages[0] and "full" in messages[0]
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    report = handle.report
    assert report.strip() == "1 1 1 1 1" and [s.sigma for s in report.steps] == pytest.approx(sigmas)
    assert report.forced is not None and word in report.forced and word in repr(report)
    assert report.flops_fraction == report.tokens_fraction == 1


@torch.no_grad()
def test_an_obstacle_may_come_and_go():
    """On some steps only: the others keep their schedule, and the report stays whole."""
    transformer = tiny.transformer()
    handle = ddit.apply(transformer, patches=fixed(2))
    with pytest.warns(UserWarning, match="img_ids"):
        for i, sigma in enumerate([1.0, 0.9, 0.8, 0.7, 0.6]):
            inputs = call_inputs(sigma=sigma, seed=i)
            transformer(**(scattered(inputs) if i in (0, 1, 3) else inputs))
    report = handle.report
    assert report.strip() == "1 1 2 1 2"
    assert report.tokens == {1: 16, 2: 4}
    assert report.tokens_fraction == pytest.approx((3 * 16 + 2 * 4) / (5 * 16))


# --- skipped steps ---

HALF = SkipSchedule(speedup=2)


def test_half_of_the_steps_are_skipped(pipe):
    """The model is really not called in them, and the report says which they are."""
    plain = tiny.sample(pipe)
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe, patches=FULL, skip=HALF)
    drawn = tiny.sample(pipe)
    report = handle.report
    assert record.tokens == [64] * (STEPS // 2)
    assert report.counts == {0: STEPS // 2, 1: STEPS // 2} and report.scales[0].count(0) == STEPS // 2
    assert report.strip() == " ".join("-" if scale == 0 else "1" for scale in report.scales[0])
    assert report.scales[0][:2] == [1, 1] and report.asked == 2
    assert report.tokens_fraction == report.flops_fraction == 0.5 and report.to_dict()["counts"]["skipped"] == 4
    assert "4 skipped" in repr(report) and "2.00x" in repr(report)
    assert not torch.equal(drawn, plain) and (drawn - plain).std() < 0.5 * plain.std()


@pytest.mark.parametrize("patches", [FULL, PLAIN])
def test_a_speedup_of_one_is_bit_equal_to_the_plain_pipeline(pipe, patches):
    plain = tiny.sample(pipe, **GUIDED)
    with ddit.apply(pipe, patches=patches, skip=SkipSchedule(speedup=1)) as handle:
        assert torch.equal(tiny.sample(pipe, **GUIDED), plain)
        assert handle.report.scales == [[1] * STEPS] and handle.report.flops_fraction == 1
    assert torch.equal(tiny.sample(pipe, **GUIDED), plain)


def test_skips_beside_large_patches(pipe):
    """Patches of a called step are the schedule's; after they change, two answers come before a forecast."""
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe, patches=fixed(*[2] * 8, 1), skip=SkipSchedule(threshold=1e9))
    latents = tiny.sample(pipe, steps=16)
    scales = handle.report.scales[0]
    assert {0, 1, 2} >= set(scales) and 0 in scales and 2 in scales
    assert record.tokens == [{1: 64, 2: 16}[scale] for scale in scales if scale]
    assert latents.isfinite().all() and latents.std() > 0.1


def test_the_rule_of_skips_beside_the_rule_of_patches(pipe):
    """Both look at the path; statistics are those of the patches, and a sample goes its way alone as in a batch."""
    z = noise(3) * torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1)
    settings: dict[str, Any] = dict(patches=COARSE, skip=SkipSchedule(threshold=0.05))
    handle = ddit.apply(pipe, **settings)
    together = tiny.sample(pipe, steps=16, latents=z, num_images_per_prompt=3)
    schedules = handle.report.scales
    assert any(0 in schedule for schedule in schedules) and any(4 in schedule for schedule in schedules)
    assert len(handle.report.steps[3].statistics[0]) == 2
    for i in range(3):
        handle = ddit.apply(pipe, **settings)
        alone = tiny.sample(pipe, steps=16, latents=z[i : i + 1])
        assert handle.report.scales == [schedules[i]]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), FlowMatchLCMScheduler()],
    ids=["stochastic", "LCM"],
)
@pytest.mark.parametrize(
    "settings",
    [
        dict(patches=FULL, skip=HALF),
        dict(patches=FULL, skip=SkipSchedule(threshold=1e9)),
        dict(patches=COARSE),
        dict(skip=HALF, preset=Preset(profile=ErrorProfile(sigmas=(0.5,), coarse={2: (0.05,)}, bend=(50.0,)))),
    ],
    ids=["plan", "rule of skips", "rule of patches", "plan over both"],
)
def test_a_sampler_that_adds_noise_keeps_full_steps_with_one_warning(pipe, scheduler, settings):
    pipe.scheduler = scheduler
    torch.manual_seed(0)
    plain = tiny.sample(pipe)
    handle = ddit.apply(pipe, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.manual_seed(0)
            drawn = tiny.sample(pipe)
            assert handle.report.scales == [[1] * STEPS]
    said = [str(w.message) for w in caught if "ddit" in str(w.message)]
    kept = "skips no step" if settings.get("patches") is FULL else "keeps full steps"
    assert len(said) == 1 and "adds noise" in said[0] and kept in said[0]
    assert torch.equal(drawn, plain)


def test_samplers_that_add_noise_are_known():
    assert adds_noise(SASolverScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))
    assert not adds_noise(tiny.unipc()) and not adds_noise(FlowMatchEulerDiscreteScheduler())


def test_a_fixed_schedule_holds_under_a_sampler_that_adds_noise(pipe, recwarn):
    pipe.scheduler = FlowMatchLCMScheduler()
    handle = ddit.apply(pipe, patches=fixed(1, 2, 4))
    tiny.sample(pipe, steps=4)
    assert handle.report.strip() == "1 2 4 4"
    assert not [w for w in recwarn.list if "ddit" in str(w.message)]


@torch.no_grad()
def test_guidance_that_pauses_calls_the_model_when_it_comes_back():
    """Guidance inside an interval: the second pass has answers too old to forecast from. It is called where the first
    is skipped, then both are, until each can forecast again."""
    transformer = tiny.transformer()
    record = Record(transformer)
    handle = skipping(transformer, (1, 1, 0, 1, 1, 0, 0, 1, 0))
    passes = [2, 2, 2, 1, 1, 2, 2, 2, 2]
    inputs, level, called = call_inputs(), torch.linspace(1, 0, len(passes) + 1).tolist(), []
    z = inputs["hidden_states"]
    for (now, then), count in zip(itertools.pairwise(level), passes, strict=True):
        before, velocities = len(record.calls), []
        for text in (inputs["encoder_hidden_states"], -inputs["encoder_hidden_states"])[:count]:
            call = dict(hidden_states=z, timestep=torch.tensor([now]), encoder_hidden_states=text)
            velocities.append(transformer(**inputs | call).sample)
        called.append(len(record.calls) - before)
        z = z + (then - now) * torch.stack(velocities).mean(0)
    assert called == [2, 2, 0, 1, 1, 1, 2, 2, 0]
    assert handle.report.strip() == "1 1 - 1 1 1 1 1 -" and z.isfinite().all()
    assert handle.report.flops_fraction == pytest.approx((2 + 2 + 0.5 + 2 + 0) / 9)  # half of step 5, all of step 6


# --- pipelines that share a transformer, sizes and steps that change ---


@pytest.mark.parametrize("settings", [dict(patches=COARSE), dict(patches=FULL, skip=HALF)], ids=["rule", "plan"])
def test_image_to_image_from_the_same_pipe(pipe, settings):
    """``from_pipe`` shares transformer and scheduler: ddit on the first pipeline sees the second one's levels."""
    kwargs: dict[str, Any] = dict(image=picture(1), strength=0.6, steps=10)
    handle = ddit.apply(pipe, **settings)
    tiny.sample(pipe, steps=20)
    second: Any = FluxImg2ImgPipeline.from_pipe(pipe)
    second.set_progress_bar_config(disable=True)
    shared = tiny.sample(second, **kwargs)
    report = handle.report
    assert second.scheduler is pipe.scheduler and second.transformer is pipe.transformer
    sigmas = [float(sigma) for sigma in second.scheduler.sigmas[-7:-1]]
    assert [step.sigma for step in report.steps] == sigmas and len(sigmas) == 6
    with ddit.apply(second, **settings) as own:
        assert torch.equal(tiny.sample(second, **kwargs), shared)
        assert own.report.scales == report.scales


@pytest.mark.parametrize("settings", [dict(patches=COARSE), dict(patches=FULL, skip=HALF)], ids=["rule", "plan"])
def test_fewer_steps_at_another_size_follow_a_long_run(pipe, settings):
    handle = ddit.apply(pipe, **settings)
    tiny.sample(pipe, steps=20)
    assert len(handle.report.steps) == 20
    after = tiny.sample(pipe, steps=8, size=(16, 48))
    report = handle.report
    assert len(report.steps) == 8 and report.tokens[1] == 48
    fresh = tiny.pipeline()
    expected = ddit.apply(fresh, **settings)
    assert torch.equal(tiny.sample(fresh, steps=8, size=(16, 48)), after)
    assert report.scales == expected.report.scales
    assert [step.sigma for step in report.steps] == [step.sigma for step in expected.report.steps]


SKIPS: dict[str, dict[str, Any]] = {
    "rule": {"patches": FULL, "skip": SkipSchedule(threshold=0.05)},
    "plan": {"patches": fixed(1, 1, 2), "speedup": 3},
    "both": {"preset": Preset(profile=ErrorProfile(sigmas=(0.1, 0.9), coarse={2: (0.3, 0.0)}, bend=(0.1, 0.1)))},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("forced", [0, 3])
@pytest.mark.parametrize("name", SKIPS)
def test_skipping_goes_on_after_a_forced_step(pipe, name, forced):
    """Whose call says something that large patches can't: it is full, and its work counts."""
    odd = {"attention_mask": None}

    def between(pipe, index, *_):
        pipe._joint_attention_kwargs = odd if index + 1 == forced else {}
        return {}

    settings = {"speedup": 2, **SKIPS[name]} if name == "both" else SKIPS[name]
    handle = ddit.apply(pipe, **settings)
    tiny.sample(pipe, steps=12, callback_on_step_end=between, joint_attention_kwargs={} if forced else odd)
    report = handle.report
    assert len(report.steps) == 12 and report.steps[forced].scales == (1,) and report.counts[0] > 0
    if "speedup" in settings:
        assert 0.3 < report.flops_fraction < 0.6


@pytest.mark.parametrize("name", ["plan", "both"])
def test_broken_latents_are_one_step_for_all_passes(pipe, name):
    """NaN equals itself: a guidance pass on it is no new step."""
    torch.nn.init.constant_(pipe.transformer.proj_out.bias, torch.nan)
    handle = ddit.apply(pipe, **{"speedup": 2, **SKIPS[name]})
    assert not tiny.sample(pipe, **GUIDED).isfinite().any()
    assert len(handle.report.steps) == STEPS


@pytest.mark.parametrize("sampler", [UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler])
def test_bfloat16_statistics_of_a_multistep_sampler(sampler):
    """UniPC's steps are made of earlier answers as well: dropped with the rounding, half of the statistic would go."""
    tables = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = tiny.wan_pipeline(scheduler=sampler)
        pipe.transformer.to(dtype)
        handle = ddit.apply(pipe, patches=PLAIN)
        words = {"prompt_embeds": tiny.embeds(0).to(dtype), "negative_prompt_embeds": tiny.embeds(1).to(dtype)}
        size = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 20, "output_type": "latent"}
        pipe(**words, **size, generator=torch.Generator().manual_seed(0))
        tables.append(torch.tensor([step.statistics[0][2] for step in handle.report.steps[3:]]))
    ratio = tables[1] / tables[0]
    assert ratio.min() > 0.9 and ratio.max() < 1.25, ratio


class Levels:
    """Keeps every step full, and what it is told of the run."""

    scales = (1,)

    def __init__(self):
        self.told = []

    def choose(self, context):
        self.told.append((context.sigma, context.total, list(context.sigmas), context.end))
        return [1] * context.batch


def test_forecasts_do_not_cross_from_one_transformer_to_the_other():
    """Wan 2.2's second one is called twice before it is forecast."""
    case = CASES["wan2.2-a14b"]
    pipe = case.make()
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1,)), skip=SkipSchedule(threshold=1e9)) as run:
        draw(pipe, case, num_inference_steps=20)
    scales = run.report.scales[0]
    boundary = pipe.config.boundary_ratio
    second = next(i for i, step in enumerate(run.report.steps) if step.sigma < boundary)
    assert second > 2 and 0 in scales[2:second] and scales[second : second + 2] == [1, 1] and 0 in scales[second + 2 :]


def test_first_and_last_frame_go_with_their_sample():
    """Wan hands over two rows of picture tokens for each sample."""
    architecture = architecture_for(tiny.wan_transformer(image_dim=16))
    call = architecture.example(2, 4, 4, 3)
    rows = {k: torch.cat([v] * 3) for k, v in call.items() if isinstance(v, torch.Tensor)}
    pictures = torch.arange(6.0)[:, None, None].expand(6, 5, 16)
    chosen = architecture.rows({**rows, "encoder_hidden_states_image": pictures}, [2, 0])
    assert chosen["encoder_hidden_states_image"][:, 0, 0].tolist() == [4, 5, 0, 1]
    assert len(chosen["hidden_states"]) == 2
    whole = architecture.rows({**rows, "encoder_hidden_states_image": pictures[:3]}, [2, 0])
    assert whole["encoder_hidden_states_image"][:, 0, 0].tolist() == [2, 0]


def test_a_run_that_begins_in_the_middle_knows_its_noise_levels():
    """The second of Wan 2.2's transformers alone."""
    case = CASES["wan2.2-a14b"]
    pipe = case.make()
    levels = Levels()
    with ddit.apply(pipe.transformer_2, patches=levels):
        draw(pipe, case)
    sigmas = pipe.scheduler.sigmas.tolist()
    begun = case.steps - len(levels.told)
    assert 0 < begun < case.steps
    for i, (sigma, total, known, end) in enumerate(levels.told, start=begun):
        assert (sigma, total, known) == (sigmas[i], case.steps - begun, sigmas[begun:-1])
        assert end == (sigmas[i + 1] if i + 1 < case.steps else 0.0)


def test_samples_of_skyreels_keep_their_frame_rates():
    architecture = architecture_for(CASES["skyreels-v2-forcing"].make().transformer)
    call = {**architecture.example(2, 4, 4, 3), "fps": [0]}
    both = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    assert architecture.rows({**both, "fps": [0, 1]}, [1])["fps"] == [1]


# --- loops of one's own ---


def test_a_loop_after_a_run_counts_its_own_steps(pipe):
    """The pipeline knows how many steps its last call had, which says nothing of this one."""
    preset = Preset(profile=ErrorProfile(sigmas=(0.1, 0.9), coarse={2: (0.3, 0.0)}, bend=(0.1, 0.1)))
    handle = ddit.apply(pipe, speedup=2, preset=preset)
    tiny.sample(pipe, steps=4)
    inputs = call_inputs()
    pipe.scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)], mu=1.0)
    z = inputs.pop("hidden_states")
    for t in pipe.scheduler.timesteps:
        v = pipe.transformer(**{**inputs, "hidden_states": z, "timestep": t.expand(1) / 1000}).sample
        z = pipe.scheduler.step(v, t, z).prev_sample
    assert len(handle.report.steps) == 10 and abs(10 * handle.report.flops_fraction - 5) <= 0.6


def test_a_step_without_noise_is_full(pipe):
    """Nothing can be divided by its level."""
    handle = ddit.apply(pipe, patches=fixed(2))
    inputs = call_inputs(sigma=0.0)
    assert pipe.transformer(**inputs).sample.isfinite().all()
    assert handle.report.scales == [[1]]


def test_several_short_runs_of_ones_own_are_no_tiles(pipe, recwarn):
    handle = ddit.apply(pipe, patches=fixed(1))
    for seed in range(3):
        pipe.transformer(**call_inputs(sigma=1.0, seed=seed))
    assert handle.report.scales == [[1, 1, 1]] and not recwarn.list


def test_tiles_are_told_of(pipe):
    handle = ddit.apply(pipe, patches=fixed(1))
    forward = pipe.transformer.forward

    def tiles(hidden_states, **kwargs):
        forward(hidden_states=hidden_states.flip(1), **kwargs)
        return forward(hidden_states=hidden_states, **kwargs)

    pipe.transformer.forward = tiles
    with pytest.warns(UserWarning, match="several latents in one step of the sampler"):
        tiny.sample(pipe, steps=2)
    assert len(handle.report.steps) == 4
