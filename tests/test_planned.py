"""Large patches planned for a speed: the plan, and what a pipeline makes of it."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

import ddit
import tiny
from ddit import PatchAdapter, PatchSchedule, PlannedSchedule, SkipSchedule
from ddit.cli import main
from ddit.config import FULL
from ddit.pipelines.methods import make_method
from ddit.planned import Planned, divergence, planned_scales
from ddit.preset import Preset
from ddit.profile import ErrorProfile
from ddit.schedule import StepContext, detail_error
from helpers import call_inputs

COSTS = {1: 1.0, 2: 0.3, 4: 0.1}
LEVELS = tuple(math.exp(1.15) / (math.exp(1.15) + 40 / (40 - i) - 1) for i in range(40))


def clip(pipe):
    """Latents of a short clip."""
    told = {"prompt_embeds": tiny.embeds(1), "negative_prompt_embeds": tiny.embeds(2), "output_type": "latent"}
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 8}
    return pipe(**told, **size, generator=torch.Generator().manual_seed(0)).frames


def anywhere(scale: int, sigma: float) -> bool:
    return True


def even(scale: int, sigma: float) -> float:
    return 0.1 * scale


def steps_of(schedule: PlannedSchedule, error=even, guard=anywhere, levels=LEVELS, costs=COSTS) -> list[int]:
    context = StepContext(0, len(levels), [{}], levels[0], levels, costs=costs)
    return Planned(schedule, error, guard).ahead(context)


def test_a_step_counts_as_girsanovs_theorem_says_at_its_best_noise():
    """Of all samplers with the same marginals and noise ``g``, the least of ``|drift's change|^2 / (2 g^2)``."""
    for sigma in (0.2, 0.5, 0.9):
        noise = np.exp(np.linspace(-8, 8, 200_001))  # g^2
        change = 1 + noise * (1 - sigma) / (2 * sigma)  # of -v + g^2 / 2 score, for an error of 1 in v
        least = (change**2 / (2 * noise)).min()
        assert divergence(sigma + 0.01, sigma - 0.01, 3.0) == pytest.approx(0.02 * 9 * least, rel=1e-6)


@pytest.mark.parametrize("costs", [{1: 1.0, 2: 0.289, 4: 0.139}, {1: 1.0, 2: 0.1193, 4: 0.0237}])
def test_no_plan_is_better(costs):
    """All plans of six steps."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        rows = np.sort(generator.random((2, 6)), 0)
        harm = {1: [0.0] * 6, 2: rows[0].tolist(), 4: [math.inf, *rows[1][1:]]}
        budget = float(generator.uniform(1.5, 6.0))

        def total(plan, table):
            return sum(table[scale][i] for i, scale in enumerate(plan))

        work = {scale: [cost] * 6 for scale, cost in costs.items()}
        chosen = planned_scales(harm, costs, budget)
        plans = [plan for plan in product((1, 2, 4), repeat=6) if total(plan, work) <= budget + 1e-9]
        assert tuple(chosen) in plans
        assert total(chosen, harm) == pytest.approx(min(total(plan, harm) for plan in plans))
    assert planned_scales(harm, costs, 0.0) == [2, 4, 4, 4, 4, 4]
    nothing = {1: [0.0] * 6, 2: [0.0] * 6, 4: [0.0] * 6}
    assert planned_scales(nothing, costs, 6.0) == [1] * 6


def test_calls_at_one_level_share_what_lies_below_it():
    """Heun's method evaluates twice at each level but the first."""
    levels = (1.0, 0.9, 0.9, 0.7, 0.7, 0.4, 0.4)
    assert steps_of(PlannedSchedule(speedup=1), levels=levels) == [1] * 7
    steps = steps_of(PlannedSchedule(speedup=1.6), levels=levels)
    assert steps == sorted(steps, reverse=True) and sum(COSTS[s] for s in steps) <= 7 / 1.6


def test_large_patches_come_first_where_noise_covers_their_errors():
    for speedup in (1.2, 1.7, 2.18, 3.0):
        steps = steps_of(PlannedSchedule(speedup=speedup))
        assert steps == sorted(steps, reverse=True) and steps[-1] == 1
        assert 40 / speedup - 1 < sum(COSTS[s] for s in steps) <= 40 / speedup + 1e-6
    assert steps_of(PlannedSchedule(speedup=1)) == [1] * 40
    assert set(steps_of(PlannedSchedule(speedup=2, scales=(1, 2)))) == {1, 2}


def test_errors_and_the_guard_move_them():
    bad = steps_of(PlannedSchedule(speedup=1.5), lambda scale, sigma: 9.0 if scale == 4 else 0.1)
    assert set(bad) == {1, 2}

    def late(scale: int, sigma: float) -> bool:
        return sigma < 0.8

    guarded = steps_of(PlannedSchedule(speedup=1.5), guard=late)
    assert all(s == 1 for s, sigma in zip(guarded, LEVELS, strict=True) if sigma >= 0.8) and set(guarded) == {1, 2, 4}
    assert steps_of(PlannedSchedule(speedup=1.5, careful=False), guard=late) == steps_of(PlannedSchedule(speedup=1.5))


def test_what_nobody_measured_is_bounded_by_the_detail():
    assert detail_error(1.0, 0.2, 2) == pytest.approx(0.2**0.5)
    assert detail_error(0.5, 0.0, 2) == 0.0
    # a Wiener estimate of n(0, h) from (1 - sigma) x + sigma eps n has this error, and v = (z - x) / sigma
    h, n, sigma = 0.3, 0.75, 0.4
    x, eps = np.random.default_rng(0).standard_normal((2, 200_000)) * np.array([[h**0.5], [n**0.5]])
    z = (1 - sigma) * x + sigma * eps
    estimate = (1 - sigma) * h / ((1 - sigma) ** 2 * h + sigma**2 * n) * z
    assert detail_error(sigma, h, 2) == pytest.approx(np.sqrt(np.mean((estimate - x) ** 2)) / sigma, rel=0.01)


@pytest.fixture
def pipe():
    return tiny.pipeline()


@pytest.fixture
def adapter(pipe):
    adapter = PatchAdapter.for_model(pipe.transformer, rank=0, min_sigma={2: 0.3, 4: 0.6})
    adapter.register_to_config(errors={"2": [[0.9, 0.1], [0.3, 0.2]], "4": [[0.9, 0.2], [0.6, 0.5]]})
    return adapter


def test_a_pipeline_takes_the_work_that_is_asked(pipe, adapter):
    for steps in (12, 30):
        with ddit.apply(pipe, patches=PlannedSchedule(speedup=1.6), adapter=adapter) as handle:
            tiny.sample(pipe, steps=steps, prompt=[tiny.PROMPT] * 2)
        report = handle.report
        assert report.scales[0] == report.scales[1] == sorted(report.scales[0], reverse=True)
        assert 1 / 1.6 - 1 / steps < report.flops_fraction <= 1 / 1.6 + 1e-6
        assert all(adapter.serves(step.scales[0], step.sigma) for step in report.steps)
        assert "asked for 1.6x less work, got 1.6" in repr(report)


def test_a_speedup_of_one_is_the_plain_run(pipe):
    plain = tiny.sample(pipe)
    with ddit.apply(pipe, patches=PlannedSchedule(speedup=1)):
        assert torch.equal(tiny.sample(pipe), plain)


def test_errors_are_the_adapters_or_those_of_the_preset_or_bounds(pipe, adapter):
    known = Preset(profile=ErrorProfile(sigmas=(0.5,), coarse={2: (0.03,)}, bend=(1.0,)))
    patches = PlannedSchedule(speedup=1.5)
    with ddit.apply(pipe, patches=patches, adapter=adapter, preset=known) as handle:
        assert handle.plan.policy.error(2, 0.6) == pytest.approx(0.15) and handle.plan.policy.error(4, 0.1) == 0.5
    with ddit.apply(pipe, patches=patches, preset=known) as handle:
        error = handle.plan.policy.error
        assert error(2, 0.6) == 0.03 and error(4, 0.6) == pytest.approx(detail_error(0.6, 0.25, 4))
    variance = {2: [0.2] * 4, 4: [0.4] * 4}
    with ddit.apply(pipe, patches=patches, detail_variance=variance) as handle:
        assert handle.plan.policy.error(2, 0.6) == pytest.approx(detail_error(0.6, 0.2, 2))


def test_a_speedup_out_of_reach_is_told_once(pipe, recwarn):
    adapter = PatchAdapter.for_model(pipe.transformer, rank=0, min_sigma={2: 0.9, 4: 0.9})
    with ddit.apply(pipe, patches=PlannedSchedule(speedup=3), adapter=adapter):
        for size in ((32, 32), (32, 48)):
            tiny.sample(pipe, steps=12, size=size)
    said = [str(warning.message) for warning in recwarn if "a speedup of 3" in str(warning.message)]
    assert len(said) == 1 and "large patches serve too few of its steps" in said[0]


def test_heuns_method_keeps_to_its_budget(pipe):
    pipe = tiny.wan_pipeline(scheduler=FlowMatchHeunDiscreteScheduler)
    plain = clip(pipe)
    with ddit.apply(pipe, patches=PlannedSchedule(speedup=1)):
        assert torch.equal(clip(pipe), plain)
    with ddit.apply(pipe, patches=PlannedSchedule(speedup=1.5, careful=False)) as handle:
        clip(pipe)
    assert 1.5 <= 1 / handle.report.flops_fraction < 1.7


def test_skipping_takes_what_patches_leave(pipe, adapter):
    settings = {"patches": PlannedSchedule(speedup=1.4), "skip": SkipSchedule(speedup=2.5), "adapter": adapter}
    with ddit.apply(pipe, **settings) as handle:
        tiny.sample(pipe, steps=30)
    assert handle.report.asked == 2.5 and set(handle.report.counts) >= {0, 1, 2}
    assert handle.report.flops_fraction == pytest.approx(1 / 2.5, abs=0.05)


def test_samplers_that_add_noise_can_be_planned_for(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    with ddit.apply(pipe, patches=PlannedSchedule(speedup=1.3, careful=False)) as handle:
        tiny.sample(pipe, steps=12)
    assert handle.report.flops_fraction == pytest.approx(1 / 1.3, abs=0.08) and set(handle.report.counts) > {1}


def test_a_sampler_that_adds_noise_skips_nothing_beside_a_plan(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    patches = PlannedSchedule(speedup=1.3, careful=False)
    with ddit.apply(pipe, patches=patches, skip=SkipSchedule(speedup=2)) as handle, pytest.warns(match="skips no step"):
        tiny.sample(pipe, steps=12)
    assert 0 not in handle.report.counts and set(handle.report.counts) > {1}


def test_without_a_pipeline_nobody_knows_the_noise_levels():
    model = tiny.transformer()
    with (
        ddit.apply(model, patches=PlannedSchedule(speedup=2)),
        pytest.raises(ValueError, match="only a pipeline knows"),
    ):
        model(**call_inputs())


def test_a_speed_in_words(pipe):
    def method(**words):
        return make_method(words, Preset(), load_adapter=lambda name: None)

    assert method(patch_speedup=2.2).patches == PlannedSchedule(speedup=2.2)
    assert method(patch_speedup=2.2, scales=(1, 2), careful=False).patches == PlannedSchedule(
        speedup=2.2, scales=(1, 2), careful=False
    )
    assert method(patch_speedup=2.2, speedup=3).skip == SkipSchedule(speedup=3)
    fixed, planned = Preset(patches=FULL), Preset(patches=PlannedSchedule(speedup=2.5, careful=False))

    def of(preset, **words):
        return make_method(words, preset, load_adapter=lambda name: None).patches

    assert of(fixed, patch_speedup=1.2) == PlannedSchedule(speedup=1.2)
    assert of(planned, patch_speedup=3) == PlannedSchedule(speedup=3, careful=False)
    assert of(planned, scales=(1, 2)) == PlannedSchedule(speedup=2.5, careful=False, scales=(1, 2))
    assert isinstance(of(planned, threshold=0.01), PatchSchedule)
    assert of(planned, patches="rule") == PatchSchedule() and of(planned) == planned.patches
    for idle in ({"threshold": 0.1}, {"patches": "rule"}, {"schedule": (1, 2)}):
        with pytest.raises(ValueError, match="would have no effect"):
            method(patch_speedup=2.2, **idle)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"speedup": 0.5}, "at least 1"),
        ({"speedup": 2, "scales": (2, 4)}, "must hold 1"),
        ({"speedup": 2, "careful": 3}, "True or False"),
    ],
)
def test_wrong_settings_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        PlannedSchedule(**wrong)


def test_a_preset_may_plan(tmp_path):
    preset = Preset(patches=PlannedSchedule(speedup=2, scales=(1, 2)))
    preset.save(tmp_path)
    assert Preset.load(tmp_path).patches == preset.patches


def test_on_the_command_line(tmp_path, capsys):
    out = tmp_path / "a.png"
    words = ["--patch-speedup", "1.5", "--steps", "12", "--json", str(tmp_path / "a.json")]
    main(["generate", "a red star", "--out", str(out), *words])
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["asked_speedup"] == 1.5 and report["flops_fraction"] <= 1 / 1.5 and report["counts"]["full"] < 12
    assert main(["generate", "a red star", "--out", str(out), "--patch-speedup", "0.3"]) == 2
    assert "speedup is 0.3" in capsys.readouterr().err
