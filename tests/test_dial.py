"""A speed or a quality that is asked for: the account is met whatever the content does."""

from __future__ import annotations

import json
import math
import warnings
from itertools import combinations, pairwise

import pytest

import ddit
import tiny
from ddit import ScheduleConfig
from ddit.cli import main
from ddit.dial import SLACK, Budget, Dial, places
from ddit.patches import half_log_snr
from ddit.preset import Preset
from ddit.schedule import Moment

DIAL = Dial(
    thresholds=(0.001, 0.002, 0.004),
    psnr=(50.0, 40.0, 30.0),
)
COSTS = {1: 1.0, 2: 0.3, 4: 0.1}
FREE = {1: 1.0, 2: 0.0, 4: 0.0}
"""Large patches that are forecast alone."""
SIGMAS = [1 - i / 12 for i in range(12)]


def test_thresholds_lie_on_the_curve():
    assert [DIAL.threshold_of_quality(db) for db in (50, 45, 30)] == pytest.approx([0.001, 0.001 * 2**0.5, 0.004])


@pytest.mark.parametrize(("asked", "threshold", "told"), [(60, 0.0, "above 50.0"), (10, 0.004, "below 30.0")])
def test_a_quality_outside_of_what_was_measured_is_remarked(asked, threshold, told):
    with pytest.warns(UserWarning, match=told):
        assert DIAL.threshold_of_quality(asked) == pytest.approx(threshold)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"thresholds": (0.002, 0.001, 0.004)}, "must rise"),
        ({"thresholds": (0.0, 0.001, 0.004)}, "must rise"),
        ({"psnr": (1.0,)}, "as many"),
    ],
)
def test_dials_that_make_no_sense(changes, told):
    values = {k: getattr(DIAL, k) for k in ("thresholds", "psnr")}
    with pytest.raises(ValueError, match=told):
        Dial(**{**values, **changes})


@pytest.mark.parametrize("total", [12, 25, 50, 100])
@pytest.mark.parametrize("speedup", [1.0, 1.25, 1.5, 2.0, 3.0])
def test_the_budget_is_met(speedup, total):
    for costs in (COSTS, FREE):
        for shift in (1, 3, 8):
            levels = [1 - i / total for i in range(total)]
            scales = scales_of(speedup, [shift * s / (1 + (shift - 1) * s) for s in levels], costs)
            assert abs(sum(costs[s] for s in scales) - total / speedup) <= SLACK + 1e-9


def test_what_cannot_be_reached_is_said_and_approached():
    with pytest.warns(UserWarning, match=r"speedup of 5 can't be reached with 12 steps.*the most is 4\.00"):
        assert scales_of(5.0, SIGMAS) == [1, 1] + 10 * [4]
    with pytest.warns(UserWarning, match=r"the most is 1\.00"):
        assert scales_of(2.0, SIGMAS, {1: 1.0}) == [1] * 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scales_of(3.0, SIGMAS)


def scales_of(speedup: float, sigmas: list[float], costs: dict[int, float] = COSTS) -> list[int]:
    """Scales of a run over these noise levels."""
    policy, total = Budget(ScheduleConfig(speedup=speedup)), len(sigmas)
    steps = [policy.choose(Moment(i, total, [{}, {}], sigma, sigmas, costs)) for i, sigma in enumerate(sigmas)]
    assert all(a == b for a, b in steps)
    return [a for a, _ in steps]


def expected_error(sigmas: list[float], fine: list[int]) -> float:
    """What `ddit.dial.places` makes least, written down gap by gap."""
    levels, ends = [half_log_snr(s) for s in sigmas], [*sigmas[1:], 0.0]
    total = 0.0
    for one, following in pairwise([*fine, len(sigmas)]):
        gap = range(one + 1, following)
        error = sum((sigmas[k] - ends[k]) * (levels[k] - levels[one]) ** 2 for k in gap)
        total += (error / (1 - ends[following - 1])) ** 2
    return total


@pytest.mark.parametrize("count", range(8))
def test_steps_at_scale_1_lie_where_forecasts_err_least(count):
    chosen = sorted(places(SIGMAS, 2, count))
    every = [expected_error(SIGMAS, [1, *others]) for others in combinations(range(2, 12), count)]
    assert len(chosen) == count and expected_error(SIGMAS, [1, *chosen]) == pytest.approx(min(every), rel=0.01)


@pytest.mark.parametrize("shift", [1, 3, 8])
def test_where_most_steps_are_at_scale_1_no_two_in_a_row_are_forecast(shift):
    sigmas = [shift * (1 - i / 50) / (1 + (shift - 1) * (1 - i / 50)) for i in range(50)]
    assert 2 not in map(sum, pairwise(s > 1 for s in scales_of(1.5, sigmas, FREE)))


def test_a_run_that_begins_midway_spends_what_a_whole_one_does():
    """As image-to-image: what lies before its first noise level does not count as due."""
    late = scales_of(2.5, [0.4 * (1 - i / 40) for i in range(40)])
    fine = [i for i, s in enumerate(late) if s == 1][2:]
    assert min(fine) > 3 and max(b - a for a, b in pairwise(fine)) <= 8


def test_a_budget_needs_the_noise_levels():
    with pytest.raises(ValueError, match="noise levels of the run"):
        Budget(ScheduleConfig(speedup=2.0)).choose(Moment(0, None, [{}]))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"speedup": 0.5}, "at least 1"),
        ({"speedup": -1.0}, "speedup"),
        ({"quality": math.inf}, "quality"),
        ({"speedup": 2.0, "quality": 30.0}, "one of them"),
        ({"speedup": 2.0, "policy": "first"}, "own schedule"),
    ],
)
def test_bad_wishes_are_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        ScheduleConfig(**fields)


# In a pipeline


@pytest.mark.parametrize("gain", [0.5, 0.0])
@pytest.mark.parametrize("speedup", [1.0, 1.5, 2.0])
def test_a_pipeline_meets_what_was_asked(speedup, gain):
    """Two samples of one batch, each on its own account."""
    pipe = tiny.pipeline()
    with ddit.apply(pipe, config=ScheduleConfig(speedup=speedup, gain=gain)) as run:
        tiny.sample(pipe, steps=24, num_images_per_prompt=2)
    report = run.report
    slack = 1 if gain else SLACK  # A look back at the anchor is paid for after the decision.
    assert abs(24 * report.flops_fraction - 24 / speedup) <= slack
    assert report.flops_fraction == pytest.approx(sum(report.flops_fractions) / 2)
    assert all(abs(24 * x - 24 / speedup) <= slack for x in report.flops_fractions)
    assert report.asked == speedup and report.to_dict()["asked_speedup"] == speedup
    assert f"asked for {speedup:g}x" in repr(report)


def test_with_an_adapter_large_patches_are_asked_and_paid_for():
    pipe = tiny.pipeline()
    adapter = ddit.PatchAdapter.for_model(pipe.transformer, rank=2)
    with ddit.apply(pipe, config=ScheduleConfig(speedup=1.5), adapter=adapter) as run:
        tiny.sample(pipe, steps=24)
    assert "4" in run.report.strip() and "-" not in run.report.strip()
    assert abs(24 * run.report.flops_fraction - 24 / 1.5) <= SLACK


def test_nothing_is_counted_where_no_budget_asks():
    pipe = tiny.pipeline()
    with ddit.apply(pipe) as run:
        tiny.sample(pipe, steps=4)
        assert run.report.asked is None and not run._generation.costs


def test_a_quality_is_a_threshold_of_the_preset(tmp_path):
    pipe = tiny.pipeline()
    with pytest.raises(ValueError, match="ddit calibrate"):
        ddit.apply(pipe, config=ScheduleConfig(quality=40.0))
    Preset(dial=DIAL).save(tmp_path)
    assert Preset.load(tmp_path).dial == DIAL
    for preset in (Preset(dial=DIAL), tmp_path):
        run = ddit.apply(pipe, config=ScheduleConfig(quality=40.0), preset=preset)
        assert run.config.threshold == pytest.approx(0.002)
    with pytest.raises(ValueError, match=r"holds no ddit\.json"):
        ddit.apply(pipe, preset=tmp_path / "none")


def test_a_pipeline_finds_the_preset_of_its_folder(tmp_path):
    tiny.pipeline().save_pretrained(tmp_path)
    Preset(dial=DIAL).save(tmp_path)
    pipe = type(tiny.pipeline()).from_pretrained(tmp_path)
    assert ddit.apply(pipe, config=ScheduleConfig(quality=40.0)).config.threshold == pytest.approx(0.002)


def test_the_paper_has_a_preset_that_says_it_is_not_calibrated():
    pipe = tiny.pipeline()
    with pytest.warns(UserWarning, match=r"the paper's values.*not calibrated.*'ddit calibrate'"):
        config = ddit.apply(pipe, preset="paper").config
    assert (config.threshold, config.percentile, config.order, config.difference) == (0.001, 0.4, 3, "plain")
    assert (config.anchored, config.start, config.positions) == (False, "bilinear", "interpolated")
    with pytest.raises(ValueError, match="or paper"):
        ddit.apply(pipe, preset="papers")


def test_a_schedule_that_is_not_given_is_the_presets():
    assert ddit.apply(tiny.pipeline(), preset=Preset(schedule={"threshold": 0.5})).config.threshold == 0.5


def test_on_the_command_line(tmp_path, capsys):
    model = tmp_path / "model"
    tiny.pipeline().save_pretrained(model)
    call = {"height": 32, "width": 32, "num_inference_steps": 16, "max_sequence_length": 20}
    Preset(call=call).save(model)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\n")
    assert main(["calibrate", "--model", str(model), "--prompts", str(prompts), "--count", "2", "--batch", "2"]) == 0
    dial = Preset.load(model).dial
    assert dial is not None and len(dial.psnr) == len(dial.thresholds)
    flags = ["generate", "a red circle", "--model", str(model), "--out", str(tmp_path / "a.png")]
    assert main([*flags, "--speedup", "2", "--json", str(tmp_path / "a.json")]) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["flops_fraction"] == pytest.approx(0.5, abs=0.07)
    assert main([*flags, "--quality", "30"]) == 0
    assert main([*flags, "--preset", "paper"]) == 0
    assert "not calibrated" in capsys.readouterr().err
    assert main([*flags, "--speedup", "0.5"]) == 2
    assert "at least 1" in capsys.readouterr().err
