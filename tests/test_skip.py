"""Skipping: forecasts and the law of their errors, the rule, the plan, and what a pipeline makes of them."""

from __future__ import annotations

import json
import math
import warnings
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ddit
import tiny
from ddit import SkipSchedule
from ddit.cli import main
from ddit.config import FULL
from ddit.patches import detail, shrink
from ddit.preset import Preset
from ddit.schedule import StepContext, channel_moments, difference, statistic
from ddit.skip.forecast import (
    BEND,
    FINEST,
    Line,
    Reference,
    difference_per_sigma,
    growth,
    half_log_snr,
)
from ddit.skip.policy import SkipPlan, SkipRule, places
from ddit.skip.skipper import Skipper

SIGMAS = [1 - i / 12 for i in range(12)]


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def path(length, shape=(2, 3, 8, 12), seed=0, dtype=torch.float32):
    """A random trajectory with noise of order one."""
    return [*noise(length, *shape, seed=seed).to(dtype)]


# --- differences per sigma ---


def forecast_error(v, levels, ahead=None):
    """How far the last velocity is from a polynomial through the others; or one still ahead."""
    nodes, target = (v[:-1], v[-1]) if ahead is None else (v[1:], ahead[1])
    where, here = (levels[:-1], levels[-1]) if ahead is None else (levels[1:], ahead[0])
    if not nodes:
        return target
    table = np.stack([np.asarray(x, dtype=np.float64) for x in nodes])
    line = np.polyfit(np.array(where), table.reshape(len(nodes), -1), len(nodes) - 1)
    powers = here ** np.arange(len(nodes) - 1, -1, -1)
    return np.asarray(target, dtype=np.float64) - (powers @ line).reshape(target.shape)


def levels(*values):
    """Levels of two samples, the second one's all lower and closer."""
    return [list(values), [x / 2 - 1 for x in values]]


UNEVEN = [-3.0, -1.5, -1.2]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_per_sigma_is_the_error_of_a_forecast(order):
    """By the other nodes, wherever they lie."""
    v = path(order, seed=order)
    ours = difference_per_sigma(v, levels(*UNEVEN[:order]))
    for sample, where in enumerate(levels(*UNEVEN[:order])):
        theirs = forecast_error([x[sample] for x in v], where)
        np.testing.assert_allclose(ours[sample], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_per_sigma_equals_plain_by_an_even_step(order):
    z = path(order + 1)
    v = [new - old for old, new in pairwise(z)]
    ours = difference_per_sigma(v, levels(*[0.1, 0.2, 0.3][:order]))
    torch.testing.assert_close(ours, difference(z, order), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_growth_gives_the_error_of_a_forecast_still_ahead(order):
    """Of velocities that are a polynomial of degree order - 1, from nodes wherever they lie."""
    c = path(order, (1, 2, 8, 8), dtype=torch.float64)

    def velocity(level):
        return torch.stack([c[k] * level**k for k in range(order)]).sum(0)

    for nodes, here in (([-3.0, -2.0, -1.5], -1.4), ([-3.0, -1.0, -0.5], 2.0)):
        nodes = nodes[:order]
        v = [velocity(x) for x in nodes]
        ours = difference_per_sigma(v, [nodes]) * growth(nodes, here)
        theirs = forecast_error(v, nodes, (here, velocity(here)))
        if order == 1:  # nothing is forecast: the velocity itself
            theirs = v[0].numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_growth_by_hand():
    """Even steps: triangular numbers for order 3, whole numbers for order 2."""
    assert [growth([1.0, 2.0, 3.0], 3.0 + n) for n in (1, 2, 3, 4)] == [1, 3, 6, 10]
    assert [growth([2.0, 3.0], 3.0 + n) for n in (1, 2, 3)] == [1, 2, 3]
    assert growth([3.0], 9.0) == 1


def test_a_constant_velocity_has_no_difference():
    (v,) = path(1)
    for order in (2, 3):
        assert difference_per_sigma([v] * order, levels(*UNEVEN[:order])).abs().max() < 1e-6


# --- forecasts ---


def test_levels_of_noise():
    """lambda of a noise level, finite from pure noise to none, and back."""
    sigma = torch.tensor([1.0, 0.999, 0.7, 0.5, 0.01, 0.0], dtype=torch.float64)
    level = half_log_snr(sigma)
    assert level.isfinite().all() and (level.diff() > 0).all() and level[3].abs() < 1e-12
    assert half_log_snr(0.7) == pytest.approx(level[2].item()) == pytest.approx(math.log(0.301 / 0.701))
    odds = level.exp()
    torch.testing.assert_close((1 + FINEST - FINEST * odds) / (1 + odds), sigma)


def test_a_line_goes_through_its_points():
    """Each sample's own, straight in exp(-BEND lambda); flat through one point, and where both lie at one level."""
    a, b = noise(3, 2, 4, 4, dtype=torch.float64), noise(3, 2, 4, 4, seed=1, dtype=torch.float64)
    first, second = torch.tensor([[-2.0, -1.0, 0.5], [-1.0, 0.0, 0.5]], dtype=torch.float64)
    flat = Line.through(a, first)
    assert torch.equal(flat.at(second), a)
    line = Line.through(b, second, flat)
    assert torch.equal(line.at(second), b)
    torch.testing.assert_close(line.at(first)[:2], a[:2])
    straight = [math.exp(-BEND * x) for x in (first[0], second[0])]
    ahead = -math.log(3 * straight[1] - 2 * straight[0]) / BEND  # twice as far from b as b is from a
    torch.testing.assert_close(line.at(torch.full_like(first, ahead))[0], b[0] + 2 * (b - a)[0])
    assert torch.equal(line.at(second + 2)[2], b[2])


def reference(batch=2, sigma=0.6):
    """A reference with one before, on random answers."""
    z0, v0, z1, v1 = (noise(batch, 3, 8, 8, seed=seed) for seed in range(4))
    before = Reference.after(z0, torch.full((batch,), sigma + 0.1), v0)
    return Reference.after(z1, torch.full((batch,), sigma), v1, before), z1, v1


def test_a_forecast_at_the_reference_itself_is_the_answer():
    made, z, v = reference()
    torch.testing.assert_close(made.forecast(z, torch.full((2,), 0.6)), v, rtol=1e-4, atol=1e-5)


def test_layout_follows_the_velocity_and_detail_ends_at_the_clean_latents():
    """Whatever detail an error has left in the latents, the step to sigma 0 takes it away."""
    made, _, _ = reference()
    z, sigma = noise(2, 3, 8, 8, seed=9), torch.full((2,), 0.5)
    level = half_log_snr(sigma)
    end = z - 0.5 * made.forecast(z, sigma)
    torch.testing.assert_close(detail(end, 2), detail(made.clean.at(level), 2), rtol=1e-4, atol=1e-5)
    layout = F.avg_pool2d(z - 0.5 * made.velocity.at(level), 2)
    torch.testing.assert_close(shrink(end, 2, 2, "noise-consistent"), layout, rtol=1e-4, atol=1e-5)


def test_rows_of_a_reference():
    made, z, _ = reference(batch=3)
    sigma = torch.full((3,), 0.4)
    whole = made.forecast(z, sigma)
    torch.testing.assert_close(made.rows([2, 0]).forecast(z[[2, 0]], sigma[:2]), whole[[2, 0]])


def test_a_grid_that_pooling_does_not_divide():
    z, v = noise(1, 3, 5, 7), noise(1, 3, 5, 7, seed=1)
    made = Reference.after(z, torch.tensor([0.6]), v)
    torch.testing.assert_close(made.forecast(z, torch.tensor([0.6])), v, rtol=1e-4, atol=1e-5)


# --- the rule ---


def test_the_rule_sums_what_forecasts_since_the_last_call_are_off_by():
    """Velocities on a parabola of lambda: the error of lines through the last two nodes, summed and grown."""
    x = noise(3, 1, 4, 8, 8)
    sigmas = [0.9 - 0.02 * i for i in range(10)]
    levels = [half_log_snr(s) for s in sigmas]
    called = [True, True, True, True, False, False, False, True, True]
    rule = SkipRule(threshold=1e9, patch_size=2)
    measured = []
    for i, sigma in enumerate(sigmas):
        moved = None
        if i:
            moved = (sigma - sigmas[i - 1]) * (x[0] + x[1] * levels[i - 1] + x[2] * levels[i - 1] ** 2)
        end = [*sigmas[1:], 0.0][i]
        rule.choose(StepContext(i, 10, [{}], sigma, sigmas, end=end), moved, called[i - 1 : i] or [False])
        measured.append((rule._owed[0], rule._measured[0]))
    # At step 6 the nodes are steps 1, 2, 3; steps 4, 5 and 6 are forecast.
    gap = sum(0.02 * (levels[k] - levels[2]) * (levels[k] - levels[3]) for k in range(4, 7))
    owed, statistic_of_one = measured[6]
    expected = statistic(channel_moments(x[2] * gap), 4, 0.4).item()
    assert owed * statistic_of_one == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("threshold", "skips"), [(0.0, 0), (1e9, 5)])
def test_the_rule_calls_until_it_knows_and_then_obeys_its_threshold(threshold, skips):
    pipe = tiny.pipeline()
    with ddit.apply(pipe, patches=FULL, skip=SkipSchedule(threshold=threshold)) as run:
        tiny.sample(pipe)
    assert run.report.scales[0][:3] == [1, 1, 1]
    assert run.report.scales[0].count(0) == skips


# --- the plan ---


def called_steps(speedup: float, sigmas: list[float]) -> list[int]:
    """Numbers of the called steps of a run over these noise levels."""
    policy, total = SkipPlan(speedup), len(sigmas)
    wished = [
        policy.choose(StepContext(i, total, [{}, {}], s, sigmas), None, [True, True]) for i, s in enumerate(sigmas)
    ]
    assert all(a == b for a, b in wished)
    return [i for i, (skip, _) in enumerate(wished) if not skip]


@pytest.mark.parametrize("total", [12, 25, 50, 100])
@pytest.mark.parametrize("speedup", [1.0, 1.25, 1.5, 2.0, 3.0])
def test_the_budget_is_met(speedup, total):
    for shift in (1, 3, 8):
        raw = [1 - i / total for i in range(total)]
        sigmas = [shift * s / (1 + (shift - 1) * s) for s in raw]
        assert abs(len(called_steps(speedup, sigmas)) - total / speedup) <= 0.5 + 1e-9


def test_what_cannot_be_reached_is_said_and_approached():
    with pytest.warns(UserWarning, match=r"speedup of 7 can't be reached with 12 steps.*the most is 6\.00"):
        assert called_steps(7.0, SIGMAS) == [0, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        called_steps(3.0, SIGMAS)


def expected_error(sigmas: list[float], fine: list[int]) -> float:
    """What `ddit.skip.policy.places` makes least, written down gap by gap."""
    levels, ends = [half_log_snr(s) for s in sigmas], [*sigmas[1:], 0.0]
    total = 0.0
    for one, following in pairwise([*fine, len(sigmas)]):
        gap = range(one + 1, following)
        error = sum((sigmas[k] - ends[k]) * (levels[k] - levels[one]) ** 2 for k in gap)
        total += (error / (1 - ends[following - 1])) ** 2
    return total


@pytest.mark.parametrize("count", range(8))
def test_called_steps_lie_where_forecasts_err_least(count):
    chosen = sorted(places(SIGMAS, 1, count))
    every = [expected_error(SIGMAS, [1, *others]) for others in combinations(range(2, 12), count)]
    assert len(chosen) == count and expected_error(SIGMAS, [1, *chosen]) == pytest.approx(min(every), rel=0.01)


@pytest.mark.parametrize("shift", [1, 3, 8])
def test_where_most_steps_are_called_no_two_in_a_row_are_forecast(shift):
    sigmas = [shift * (1 - i / 50) / (1 + (shift - 1) * (1 - i / 50)) for i in range(50)]
    assert max(b - a for a, b in pairwise(called_steps(1.5, sigmas))) <= 2


@pytest.mark.parametrize("count", range(5))
def test_a_plan_made_anew_midway_is_the_best_of_what_is_left(count):
    chosen = sorted(places(SIGMAS, 3, count, first=6))
    every = [expected_error(SIGMAS, [3, *others]) for others in combinations(range(6, 12), count)]
    assert len(chosen) == count and expected_error(SIGMAS, [3, *chosen]) == pytest.approx(min(every), rel=0.01)


def test_a_run_that_begins_midway_spends_what_a_whole_one_does():
    """As image-to-image: what lies before its first noise level does not count as due."""
    late = called_steps(2.5, [0.4 * (1 - i / 40) for i in range(40)])
    assert max(b - a for a, b in pairwise(late)) <= 8


def test_a_plan_needs_the_noise_levels():
    with pytest.raises(ValueError, match="noise levels of the run"):
        SkipPlan(2.0).choose(StepContext(0, None, [{}]), None, [True])


# --- what is kept of a run ---


def test_a_pass_that_paused_is_not_ready():
    """Guidance inside an interval: the pass that comes back has old answers."""
    skipper = Skipper(SkipPlan(2.0))
    z = noise(1, 3, 8, 8)
    skipper.choose(StepContext(0, 8, [{}], 1.0, SIGMAS[:8]), None, [])
    for step in range(3):
        for which in range(2 if step < 2 else 1):
            skipper.observe(which, step, [True], [1], z, z, 1 - step / 8)
    assert skipper.ready(0, 0) and not skipper.ready(1, 0) and not skipper.ready(2, 0)


def test_after_a_change_of_patches_two_answers_are_needed():
    skipper = Skipper(SkipPlan(2.0))
    z = noise(1, 3, 8, 8)
    skipper.choose(StepContext(0, 8, [{}], 1.0, SIGMAS[:8]), None, [])
    ready = []
    for step, kind in enumerate([2, 2, 1, 1]):
        skipper.observe(0, step, [True], [kind], z, z, 1 - step / 8)
        ready.append(skipper.ready(0, 0))
    assert ready == [False, True, False, True]


# --- in a pipeline ---


@pytest.mark.parametrize("speedup", [1.0, 1.5, 2.0])
def test_a_pipeline_meets_what_was_asked(speedup):
    pipe = tiny.pipeline()
    plain = tiny.sample(pipe, steps=24, num_images_per_prompt=2)
    with ddit.apply(pipe, patches=FULL, skip=SkipSchedule(speedup=speedup)) as run:
        ours = tiny.sample(pipe, steps=24, num_images_per_prompt=2)
    report = run.report
    assert abs(24 * report.flops_fraction - 24 / speedup) <= 0.5
    assert report.flops_fraction == pytest.approx(sum(report.flops_fractions) / 2)
    assert report.asked == speedup and report.to_dict()["asked_speedup"] == speedup
    assert f"asked for {speedup:g}x" in repr(report)
    assert torch.equal(ours, plain) == (speedup == 1)


@pytest.mark.parametrize("steps", [(1, 1, 1, *[4] * 12, 1), (1, 1, *[2] * 20, 1), (4, 4, 1)])
def test_what_patches_save_pays_for_calls(steps):
    """The budget is the whole run's: with patches as well, a run takes half of a plain one's work, not less."""
    pipe = tiny.pipeline()
    with ddit.apply(pipe, patches=ddit.FixedSchedule(steps=steps), skip=SkipSchedule(speedup=2)) as run:
        tiny.sample(pipe, steps=30)
    assert abs(30 * run.report.flops_fraction - 15) <= 1
    assert run.report.counts[0] < 15 < 30 - run.report.counts[0]


def test_without_skipping_nothing_is_asked():
    pipe = tiny.pipeline()
    with ddit.apply(pipe) as run:
        tiny.sample(pipe, steps=4)
        assert run.report.asked is None and 0 not in run.report.scales[0]


def test_a_pipeline_finds_the_preset_of_its_folder(tmp_path):
    tiny.pipeline().save_pretrained(tmp_path)
    Preset(patches=ddit.PatchSchedule(threshold=0.5)).save(tmp_path)
    pipe = type(tiny.pipeline()).from_pretrained(tmp_path)
    assert ddit.apply(pipe).plan.measure.threshold == 0.5
    with pytest.raises(ValueError, match=r"holds no ddit\.json"):
        ddit.apply(pipe, preset=tmp_path / "none")


def test_the_paper_has_a_preset_that_says_it_is_not_calibrated():
    pipe = tiny.pipeline()
    with pytest.warns(UserWarning, match=r"the paper's values.*not calibrated.*'ddit calibrate'"):
        handle = ddit.apply(pipe, preset="paper")
    assert handle.plan.measure == ddit.PatchSchedule.paper()
    with pytest.raises(ValueError, match="or paper"):
        ddit.apply(pipe, preset="papers")


def test_a_schedule_that_is_not_given_is_the_presets(tmp_path):
    preset = Preset(patches=ddit.PatchSchedule(threshold=0.5))
    preset.save(tmp_path)
    loaded = Preset.load(tmp_path)
    assert loaded.patches == preset.patches
    assert ddit.apply(tiny.pipeline(), preset=tmp_path).plan.measure.threshold == 0.5


def test_a_preset_of_another_version_says_what_to_do(tmp_path):
    (tmp_path / "ddit.json").write_text(json.dumps({"version": 2, "schedule": {"threshold": 0.1}}))
    with pytest.raises(ValueError, match=r"has version 2, this ddit reads version 5.*calibrate"):
        Preset.load(tmp_path)


def test_on_the_command_line(tmp_path, capsys):
    model = tmp_path / "model"
    tiny.pipeline().save_pretrained(model)
    call = {"height": 32, "width": 32, "num_inference_steps": 16, "max_sequence_length": 20}
    Preset(call=call).save(model)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\n")
    assert main(["calibrate", "--model", str(model), "--prompts", str(prompts), "--count", "2", "--batch", "2"]) == 0
    curve = Preset.load(model).quality
    assert curve is not None and len(curve.psnr) == len(curve.errors)
    flags = ["generate", "a red circle", "--model", str(model), "--out", str(tmp_path / "a.png")]
    speedup = [*flags, "--patches", "full", "--speedup", "2", "--json", str(tmp_path / "a.json")]
    assert main(speedup) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["flops_fraction"] == pytest.approx(0.5, abs=0.07)
    assert result["counts"] == {"skipped": 8, "full": 8}
    assert main([*flags, "--quality", "30"]) == 0
    assert main([*flags, "--preset", "paper"]) == 0
    assert "not calibrated" in capsys.readouterr().err
    for bad, told in [
        (["--speedup", "0.5"], "at least 1"),
        (["--speedup", "2", "--quality", "30"], "needs one of"),
        (["--schedule", "1", "2", "--threshold", "0.1"], "threshold would have no effect beside a schedule"),
        (["--patches", "full", "--scales", "1", "2"], "scales would have no effect"),
    ]:
        assert main([*flags, *bad]) == 2
        assert told in capsys.readouterr().err


def test_what_patches_save_already_is_not_skipped_for():
    """A fixed schedule says beforehand what its steps will cost."""
    pipe = tiny.pipeline()
    with ddit.apply(pipe, patches=ddit.FixedSchedule(steps=(1, 1, 1, 2)), skip=SkipSchedule(speedup=1.8)) as run:
        tiny.sample(pipe, steps=20)
    assert 0 not in run.report.scales[0] and 1 / run.report.flops_fraction > 1.8


def test_a_speedup_that_is_missed_is_told():
    """Patches that change in every step leave no two answers alike to forecast from."""
    pipe = tiny.pipeline()
    with (
        pytest.warns(UserWarning, match=r"a speedup of 3 was asked for, and the run got 1\.\d+"),
        ddit.apply(pipe, patches=ddit.FixedSchedule(steps=(1, 2) * 10), skip=SkipSchedule(speedup=3)),
    ):
        tiny.sample(pipe, steps=20)


def test_what_a_cache_answers_counts_for_what_it_costs():
    """With a cache as well, a run takes half of a plain one's work, not less."""
    pipe = tiny.pipeline()
    with ddit.apply(pipe, patches=FULL, skip=SkipSchedule(speedup=1.5), cache="first-block:0.3") as run:
        tiny.sample(pipe, steps=40)
    assert any(step.reused for step in run.report.steps)
    assert run.report.flops_fraction > 0.6


def test_what_can_be_had_beside_large_patches_is_told_truly():
    """Their first steps cost less."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SkipPlan(3.0).plan(SIGMAS[:5], 0.3)
    with pytest.warns(UserWarning, match="the most is 2.50"):
        SkipPlan(3.0).plan(SIGMAS[:5])
