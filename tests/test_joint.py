"""Plans over patches and skipping, and the profile they are made with."""

import json
import math
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import ddit
import tiny
from ddit import FixedSchedule, PatchAdapter, SkipSchedule
from ddit.coarse import coarse_step
from ddit.config import Coarse
from ddit.eval import calibrate
from ddit.eval.step_errors import measured_errors, passes
from ddit.models import architecture_for
from ddit.pipelines.generate import recorded
from ddit.pipelines.known import cost_ratios
from ddit.pipelines.loading import EMBEDDED, load_adapter
from ddit.preset import Preset, QualityCurve
from ddit.pretrained import fingerprint
from ddit.profile import ErrorProfile
from ddit.skip.joint import SKIPPED, Segments, cheapest_steps, expected_error, nearest_steps

RESULTS = Path(__file__).parent.parent / "docs" / "results"
COSTS = {1: 1.0, 2: 0.3, 4: 0.1}
PROFILE = ErrorProfile(sigmas=(0.2, 0.9), coarse={2: (0.5, 0.1), 4: (0.9, 0.3)}, bend=(0.4, 0.4))


def anywhere(scale: int, sigma: float) -> bool:
    return True


def joint_steps(levels, costs, speedup, profile, guard):
    return nearest_steps(Segments.of(levels, tuple(costs), profile, guard), costs, speedup)


def sigmas(total: int) -> list[float]:
    return [math.exp(1.15) / (math.exp(1.15) + total / (total - i) - 1) for i in range(total)]


def test_a_profile_is_read_between_its_levels_and_kept_in_json():
    assert PROFILE.coarse_error(2, 0.55) == pytest.approx(0.3) and PROFILE.coarse_error(4, 0.1) == 0.9
    assert PROFILE.coarse_error(1, 0.5) == 0 and PROFILE.coarse_error(8, 0.5) == math.inf
    assert ErrorProfile.from_dict(json.loads(json.dumps(asdict(PROFILE)))) == PROFILE
    better = PROFILE.learnt({2: {0.9: 0.05, 0.3: 0.2}})
    assert better.coarse[2] == (0.2, 0.05) and better.coarse[4] == PROFILE.coarse[4]
    with pytest.raises(ValueError, match="a number of each list"):
        ErrorProfile(sigmas=(0.1, 0.2), coarse={2: (1.0,)}, bend=(1.0, 1.0))
    with pytest.raises(ValueError, match="must rise"):
        ErrorProfile(sigmas=(0.2, 0.1), coarse={}, bend=(1.0, 1.0))


def test_a_plan_costs_no_more_than_asked_and_little_less():
    levels = sigmas(50)
    for speedup in (1.0, 1.3, 2.18, 3.0, 5.0, 8.0):
        steps = joint_steps(levels, COSTS, speedup, PROFILE, anywhere)
        work = sum(COSTS[s] for s in steps if s != SKIPPED)
        assert 50 / speedup - 1 <= work <= 50 / speedup + 1e-6
    assert joint_steps(levels, COSTS, 1.0, PROFILE, anywhere) == (1,) * 50


@pytest.mark.parametrize("costs", [{1: 1.0, 2: 0.289}, {1: 1.0, 2: 0.1193, 4: 0.0237}])
def test_no_plan_errs_less_for_its_work(costs):
    """All plans of six steps, against dynamic programming."""
    segments = Segments.of(sigmas(6), tuple(costs), PROFILE, anywhere)
    plans = [plan for plan in product((0, *costs), repeat=6) if plan[0]]
    errors = {plan: segments.error(plan) for plan in plans}
    for speedup in (1.0, 1.3, 2.0, 2.7, 4.0):
        budget = 6 / speedup
        best = nearest_steps(segments, costs, speedup)
        assert segments.work(best, costs) <= budget + 1e-9
        least = min(error for plan, error in errors.items() if segments.work(plan, costs) <= budget + 1e-9)
        assert errors[best] == pytest.approx(least, rel=1e-5)
        cheap = cheapest_steps(segments, costs, errors[best] * 1.001)
        enough = [segments.work(plan, costs) for plan, error in errors.items() if error <= errors[best] * 1.001]
        assert errors[cheap] <= errors[best] * 1.001 and segments.work(cheap, costs) == pytest.approx(min(enough))


def test_a_long_plan_spends_its_budget_and_says_truly_what_can_be_had():
    costs = {1: 1.0, 2: 0.1193, 4: 0.0237}
    segments = Segments.of(sigmas(50), tuple(costs), PROFILE, anywhere)
    assert segments.work(nearest_steps(segments, costs, 8.0), costs) > 50 / 8 - 0.2
    with pytest.warns(UserWarning, match=f"the most is {50 / (2 * 0.0237):.2f}"):
        nearest_steps(segments, costs, 5000.0)


def test_forecasts_come_after_two_answers_alike():
    for speedup in (2.0, 4.0, 7.0):
        steps = joint_steps(sigmas(40), COSTS, speedup, PROFILE, anywhere)
        called = [s for s in steps if s]
        seen = 0
        for scale in steps:
            if scale == SKIPPED:
                assert seen >= 2 and called[seen - 1] == called[seen - 2]
            else:
                seen += 1


def test_cheap_errors_are_taken():
    """Where forecasts are bad, patches save the work; where large patches are, or may not be used, forecasts do."""
    levels = sigmas(40)
    wild = ErrorProfile(sigmas=(0.5,), coarse={2: (0.01,), 4: (9.0,)}, bend=(50.0,))
    assert set(joint_steps(levels, COSTS, 2.0, wild, anywhere)) == {1, 2}
    blurred = ErrorProfile(sigmas=(0.5,), coarse={2: (9.0,), 4: (9.0,)}, bend=(0.01,))
    assert set(joint_steps(levels, COSTS, 2.0, blurred, anywhere)) == {0, 1}
    early = joint_steps(levels, COSTS, 1.5, wild, lambda scale, sigma: sigma > 0.7)
    assert all(sigma > 0.7 for step, sigma in zip(early, levels, strict=True) if step > 1) and 2 in early


def test_a_speedup_out_of_reach_is_told():
    with pytest.warns(UserWarning, match="a speedup of 99 can't be reached with 8 steps: the most is"):
        joint_steps(sigmas(8), COSTS, 99.0, PROFILE, anywhere)


def test_a_quality_takes_the_least_work_that_keeps_to_its_error():
    """Each plan for a speedup is as near as it can be: none that costs less may err less."""
    levels = sigmas(30)
    segments = Segments.of(levels, tuple(COSTS), PROFILE, anywhere)
    for speedup in (1.5, 2.5, 5.0):
        near = nearest_steps(segments, COSTS, speedup)
        error = expected_error(levels, near, PROFILE)
        assert error == pytest.approx(segments.error(near))
        cheap = cheapest_steps(segments, COSTS, error)
        assert segments.error(cheap) <= error * (1 + 1e-6)
        assert segments.work(cheap, COSTS) <= segments.work(near, COSTS) + 1e-9
    assert cheapest_steps(segments, COSTS, 0.0) == (1,) * 30
    assert segments.work(cheapest_steps(segments, COSTS, math.inf), COSTS) == pytest.approx(0.2)


@pytest.fixture
def pipe():
    return tiny.pipeline()


WILD = ErrorProfile(sigmas=(0.5,), coarse={2: (0.01,), 4: (0.02,)}, bend=(0.5,))


def test_a_speedup_is_planned_over_both_where_there_is_a_profile(pipe):
    adapter = PatchAdapter.for_model(pipe.transformer, rank=0, min_sigma={2: 0.3, 4: 0.6})
    plain = tiny.sample(pipe, steps=16)
    with ddit.apply(pipe, speedup=3, preset=Preset(profile=WILD), adapter=adapter) as handle:
        drawn = tiny.sample(pipe, steps=16)
    scales = {step.scales[0] for step in handle.report.steps}
    assert scales == {0, 1, 2, 4} and torch.isfinite(drawn).all() and not torch.equal(drawn, plain)
    assert handle.report.flops_fraction == pytest.approx(1 / 3, abs=0.05) and handle.report.flops_fraction <= 1 / 3
    assert all(adapter.serves(step.scales[0], step.sigma) for step in handle.report.steps)


def test_without_a_profile_or_with_patches_given_the_rule_decides_on_patches(pipe):
    for settings in ({"preset": Preset()}, {"patches": FixedSchedule(steps=(1,)), "preset": Preset(profile=WILD)}):
        with ddit.apply(pipe, speedup=2, **settings) as handle:
            tiny.sample(pipe, steps=16)
        assert 0 in {step.scales[0] for step in handle.report.steps}
        assert "Joint" not in type(handle.plan.policy).__name__
    with ddit.apply(pipe, skip=SkipSchedule(speedup=2), preset=Preset(profile=WILD)) as handle:
        assert type(handle.plan.policy).__name__ == "JointPatches"


CURVE = QualityCurve(errors=(1e-5, 1e-3), psnr=(50, 30))


def test_a_quality_is_an_error_between_those_measured_and_beyond():
    assert CURVE.error_of(40) == pytest.approx(1e-4)
    assert CURVE.error_of(20) == pytest.approx(1e-2) and CURVE.error_of(60) == pytest.approx(1e-6)
    for wrong in ({"errors": (1.0,)}, {"errors": (2.0, 1.0)}, {"errors": (0.0, 1.0)}):
        with pytest.raises(ValueError, match="a quality curve"):
            QualityCurve(**{"errors": (1.0, 2.0), "psnr": (2.0, 1.0), **wrong})


def test_a_quality_is_planned_over_both(pipe):
    known = Preset(profile=WILD, quality=CURVE)
    adapter = PatchAdapter.for_model(pipe.transformer, rank=0)
    work = []
    for quality in (45, 20):
        with ddit.apply(pipe, quality=quality, preset=known, adapter=adapter) as handle:
            tiny.sample(pipe, steps=16)
        steps = handle.report.steps
        error = expected_error([s.sigma for s in steps], [s.scales[0] for s in steps], WILD)
        assert error <= CURVE.error_of(quality) * (1 + 1e-9)
        work.append(handle.report.flops_fraction)
    assert work[0] > work[1] and handle.report.asked is None
    with ddit.apply(pipe, quality=20, preset=known, patches=FixedSchedule(steps=(1,))) as handle:
        tiny.sample(pipe, steps=16)
    assert {step.scales[0] for step in handle.report.steps} == {0, 1}
    for settings, said in (
        ({"preset": Preset(profile=WILD)}, "ddit calibrate"),
        ({"preset": known, "patches": FixedSchedule(steps=(2,))}, "leave out patches"),
    ):
        with pytest.raises(ValueError, match=said):
            ddit.apply(pipe, quality=30, **settings)


def test_an_adapters_own_errors_count(pipe):
    adapter = PatchAdapter.for_model(pipe.transformer, rank=0)
    adapter.register_to_config(errors={"2": [[0.9, 0.1], [0.3, 0.2]]})
    with ddit.apply(pipe, speedup=2, preset=Preset(profile=WILD), adapter=adapter) as handle:
        errors = handle.plan.policy.plan.profile
    assert errors.coarse[2][0] == pytest.approx(0.2 - 0.1 * (0.5 - 0.3) / 0.6) and errors.coarse[4] == (0.02,)


def test_calibrate_measures_the_profile(pipe):
    settings = {"height": 64, "width": 64, "num_inference_steps": 12}
    errors = calibrate.plain_runs(pipe, [tiny.PROMPT] * 2, [0, 1], settings, (2, 4)).errors
    assert set(errors.coarse) == {2, 4} and errors.sigmas == sorted(errors.sigmas, reverse=True)
    assert all(len(row) == len(errors.sigmas) >= 4 for row in (*errors.coarse.values(), errors.bend))
    assert np.mean(errors.coarse[4]) > np.mean(errors.coarse[2]) > 0 and min(errors.bend) > 0
    profile = calibrate.profile_of([(2, errors), (1, errors)])
    assert profile is not None and profile.sigmas == tuple(errors.sigmas[::-1])
    assert profile.coarse[2][-1] == pytest.approx(errors.coarse[2][0] ** 0.5)
    assert type(errors).from_dict(json.loads(json.dumps(asdict(errors)))) == errors


def test_plans_and_reports_reckon_with_the_costs_of_a_large_model(pipe):
    """On a small model patches save less than on a large one, whose costs a plan may be told."""
    costs = {1: 1.0, 2: 0.119, 4: 0.024}
    expensive = ErrorProfile(sigmas=(0.5,), coarse={2: (0.05,), 4: (0.06,)}, bend=(50.0,))
    own, wan = ({"profile": expensive, "costs": c} for c in ({}, costs))
    counts = []
    for preset in (own, wan):
        with ddit.apply(pipe, speedup=3, preset=Preset(**preset)) as handle:
            handle.plan.policy.plan = replace(handle.plan.policy.plan, guard=anywhere)
            tiny.sample(pipe, steps=16)
        counts.append(handle.report.counts.get(1, 0))
    assert counts[1] > counts[0]
    report = replace(handle.report, flops={s: costs[s] for s in handle.report.flops})
    expected = sum(costs[s] * n for s, n in report.counts.items() if s) / 16
    assert report.flops_fraction == pytest.approx(expected) and report.flops_fraction <= 1 / 3
    assert handle.report.flops_fraction > report.flops_fraction


def test_cost_ratios_are_those_of_the_published_tables():
    for name, table in (("flux.1-dev", "flops-pictures"), ("wan2.1-1.3b", "flops-video")):
        rows = json.loads((RESULTS / f"{table}.json").read_text())["counts"]
        row = next(row for row in rows if row["model"] == name and row["height"] in (1024, 480))
        told = {int(s): 1 / v["ratio"] for s, v in row["scales"].items()}
        assert cost_ratios(name) == pytest.approx(told, rel=1e-6)
    with pytest.raises(ValueError, match="makes sound"):
        cost_ratios("ace-step-1.5")


def test_of_errors_of_one_likeness_the_largest_is_allowed():
    curve = QualityCurve(errors=(1e-4, 1e-3, 1e-2), psnr=(80, 80, 30))
    assert curve.error_of(80) == pytest.approx(1e-3) and curve.error_of(30) == pytest.approx(1e-2)


def test_a_quality_with_another_adapter_than_it_was_measured_with_is_warned_about(pipe):
    adapter = PatchAdapter.for_model(pipe.transformer, rank=0)
    for curve, settings, how in (
        (CURVE, {"adapter": adapter}, "without an adapter"),
        (replace(CURVE, adapter="another"), {"adapter": adapter}, "with another adapter"),
        (replace(CURVE, adapter="another"), {}, "with another adapter"),
    ):
        with pytest.warns(UserWarning, match=f"qualities were measured {how}"):
            ddit.apply(pipe, quality=30, preset=Preset(profile=WILD, quality=curve), **settings).remove()


def test_errors_are_those_of_the_guided_answer():
    """Of two passes, whether in two calls or stacked in one, and of one pass its own."""
    pipe = tiny.wan_pipeline()
    call = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 12, "output_type": "latent"}
    prompts = {"prompt_embeds": tiny.embeds(1), "negative_prompt_embeds": tiny.embeds(2)}
    architecture = architecture_for(pipe.transformer)
    with recorded(pipe) as calls:
        pipe(**call, **prompts, generator=torch.Generator().manual_seed(0))
    alone = [measured_errors(architecture, calls[which::2], (2,)) for which in (0, 1)]
    both, guided = (measured_errors(architecture, calls, (2,), scale) for scale in (1.0, 5.0))
    assert both.coarse[2] == pytest.approx(np.mean([errors.coarse[2] for errors in alone], 0).tolist())
    assert both.bend == pytest.approx(np.mean([errors.bend for errors in alone], 0).tolist())
    last = guided.sigmas[-1]
    step = min(passes(architecture, calls), key=lambda step: abs(float(step[0].noisy.sigma[0]) - last))
    forward = pipe.transformer.forward
    one, two = (coarse_step(architecture, forward, p.inputs, p.noisy, 2, Coarse()) - p.velocity for p in step)
    # What the passes have in common is taken once, what they differ in by how far guidance drives them apart.
    expected = (one.square().mean() + two.square().mean()) / 2 + 5 * 4 * (one - two).square().mean()
    assert guided.coarse[2][-1] == pytest.approx(expected.item(), rel=1e-4)
    assert guided.coarse[2][-1] > both.coarse[2][-1]


@pytest.mark.parametrize("model", EMBEDDED)
def test_qualities_of_the_embedded_models_are_those_of_their_adapters(model):
    preset = Preset.load(EMBEDDED[model])
    adapter = load_adapter(preset.adapter, dtype="float32", device="cpu")
    assert preset.quality is not None and preset.quality.adapter == fingerprint(adapter)
