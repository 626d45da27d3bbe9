"""Where steps at scale 1 lie: even distances, and what a plain run says in hindsight."""

from __future__ import annotations

import numpy as np
import pytest

import tiny
from ddit.eval.decisions import even, hindsight, interval_errors, least, oracle, plain_paths
from ddit.eval.quality import _add_regret, fit, parse_method
from ddit.patches import BEND, half_log_snr
from ddit.preset import Preset

SIGMAS = [1 - k / 20 for k in range(20)]
BENT = np.array([np.exp(-BEND * half_log_snr(s)) for s in SIGMAS])


def gram(velocities: np.ndarray) -> np.ndarray:
    """Of velocities ``[T, N]``."""
    return velocities @ velocities.T


def test_even_distances_end_with_half_a_one():
    assert even(50, 3, 5) == [11, 19, 28, 36, 45]
    assert even(12, 3, 1) == [8]


def test_a_path_that_forecasts_get_right_costs_nothing():
    straight = np.stack([np.ones(20), BENT, 3 - 2 * BENT], axis=1)
    errors = interval_errors(gram(straight), SIGMAS)
    assert np.isfinite(errors[2, 3]).sum() == 20 - 4 + 1
    assert errors[2, 3][4:].max() == pytest.approx(0, abs=1e-9)


def test_errors_are_those_of_forecasts():
    """One velocity off the line by 1: that step's width, grown until the end, squared."""
    path = BENT[:, None].copy()
    path[7] += 1
    errors = interval_errors(gram(path), SIGMAS)
    assert errors[1, 4, 7] == pytest.approx(0, abs=1e-9)
    assert errors[1, 4, 8] == pytest.approx((0.05 / (1 - SIGMAS[8])) ** 2, rel=0.01)
    assert errors[1, 4, 20] == pytest.approx(0.05**2, rel=0.01)


def test_the_least_errors_are_found():
    """All triples tried by hand."""
    velocities = np.random.default_rng(0).normal(size=(20, 3)).cumsum(0)
    errors = interval_errors(gram(velocities), SIGMAS)

    def total(a: int, b: int) -> float:
        return errors[1, 2, a] + errors[2, a, b] + errors[a, b, 20]

    best = min((total(a, b), [a, b]) for a in range(3, 20) for b in range(a + 1, 20))
    assert least(errors, 3, 2) == best[1]


def test_an_oracle_draws_each_sample_by_its_own_schedule():
    pipe = tiny.pipeline()
    settings = {"height": 32, "width": 32, "num_inference_steps": 14, "max_sequence_length": 20}
    method = parse_method("oracle:fine=4,scales=1/4", 14, Preset(), lambda _: None)
    assert method.config is not None and method.oracle == 4
    outcome = oracle(pipe, ["a red circle", "a blue star"], [0, 1], settings, method.config, Preset(), method.oracle)
    assert outcome.report is not None
    for scales in outcome.report.scales:
        assert list(scales).count(1) == 3 + 4 and set(scales) == {1, 4} and list(scales[:3]) == [1, 1, 1]


def test_a_fitted_schedule_is_the_hindsight_of_other_prompts_mean():
    pipe = tiny.pipeline()
    settings = {"height": 32, "width": 32, "max_sequence_length": 20}
    method = parse_method("fitted:fine=4,scales=1/4", 14, Preset(), lambda _: None)
    prompts = [f"a red circle and {n} blue stars" for n in range(10)]  # two batches
    fitted = fit(method, pipe, prompts, settings).config
    assert fitted is not None and method.config is not None
    sigmas, grams = plain_paths(pipe, prompts, range(10), {**settings, "num_inference_steps": 14})
    assert grams.shape == (10, 14, 14)
    assert fitted.steps == hindsight(grams.mean(0), sigmas, method.config, 4)
    assert fitted.policy == "fixed" and fitted.steps.count(1) == 3 + 4 and fitted.gain == 0
    other = parse_method("even:fine=4,scales=1/4", 14, Preset(), lambda _: None)
    assert fit(other, pipe, prompts, settings) is other


@pytest.mark.parametrize("text", ["even", "oracle:fine=0", "oracle:fine=11", "fitted:fine=11", "even:fine=x"])
def test_numbers_of_steps_that_make_no_sense(text):
    with pytest.raises(ValueError, match="needs fine"):
        parse_method(text, 14, Preset(), lambda _: None)


def test_regret_looks_at_methods_of_no_more_work():
    rows = [
        {"flops_fraction": 1.0, "run_steps": 50, "psnr_of_each": [80.0, 80.0]},
        {"flops_fraction": 0.25, "run_steps": 50, "psnr_of_each": [40.0, 30.0]},
        {"flops_fraction": 0.5, "run_steps": 25, "psnr_of_each": [30.0, 36.0]},
        {"flops_fraction": 0.2, "run_steps": 50, "psnr_of_each": [20.0, 20.0]},
    ]
    _add_regret(rows)
    assert [row["regret"] for row in rows] == pytest.approx([0.0, 3.0, 5.0, 0.0])
